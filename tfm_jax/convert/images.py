"""How another library prepares images, as our section `data`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tfm_jax.convert.huggingface import read_json
from tfm_jax.errors import UserError

FILE = "preprocessor_config.json"
# Numbers of Pillow's filters.
RESAMPLE = {2: "bilinear", 3: "bicubic"}
# What a class takes where a file leaves it out.
_DEFAULTS: dict[str, Any] = {"size": 224, "crop_size": 224, "resample": 2, "do_center_crop": False}
_DEIT = {"size": 256, "crop_size": 224, "resample": 3, "do_center_crop": True}
_UNNAMED = re.compile(r"^LABEL_\d+$")


def read_settings(folder: Path) -> dict[str, Any]:
    """Sizes, cut and normalisation of a `preprocessor_config.json`; nothing without one.

    Raises:
      UserError: it prepares images in another way than `data.images` can.
    """
    if not (folder / FILE).is_file():
        return {}
    given, lines = read_json(folder / FILE), list[str]()
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    theirs = _DEFAULTS | (_DEIT if kind.startswith("DeiT") else {}) | given
    size = _side(theirs["size"])
    crop = _side(theirs["crop_size"]) if theirs["do_center_crop"] else size
    if size is None or crop is None:
        lines.append(f"size={theirs['size']!r}, crop_size={theirs['crop_size']!r}: squares only")
    for name, usual in (("do_resize", True), ("do_rescale", True), ("rescale_factor", 1 / 255)):
        value = theirs.get(name, usual)
        if not isinstance(value, int | float) or abs(value - usual) > 1e-9:
            lines.append(f"{name}={value!r}: only {usual!r}")
    if theirs["resample"] not in RESAMPLE:
        lines.append(f"resample={theirs['resample']!r}: only {', '.join(map(str, RESAMPLE))}")
    if lines:
        raise UserError(f"{folder / FILE} prepares images as `data.images` cannot:\n  " + "\n  ".join(lines))
    normal = theirs.get("do_normalize", True)
    # The shortest edge keeps an image's shape; a height and a width, or one number for both, squeeze it.
    keeps = isinstance(theirs["size"], dict) and "shortest_edge" in theirs["size"]
    return {
        "image_size": crop,
        "scaled_to": size,
        "fit": "cover" if keeps else "squeeze",
        "resample": RESAMPLE[theirs["resample"]],
        "mean": theirs.get("image_mean", (0.5, 0.5, 0.5)) if normal else (0.0,),
        "std": theirs.get("image_std", (0.5, 0.5, 0.5)) if normal else (1.0,),
    }


def _side(size: Any) -> int | None:
    """224, {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    sides = set(size.values()) if isinstance(size, dict) else {size} if isinstance(size, int) else set()
    return sides.pop() if len(sides) == 1 and all(isinstance(side, int) for side in sides) else None


def read_classes(config: dict[str, Any]) -> dict[str, Any]:
    """The names of a `config.json`'s classes in their order; nothing where they have none."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not all(str(key).isdigit() for key in labels):
        return {}
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    return {} if all(_UNNAMED.match(name) for name in names) else {"classes": names}


def write_classes(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` for the classes that a run's section `data` names."""
    numbers = {name: i for i, name in enumerate(data.get("classes") or data.get("names") or [])}
    return {"id2label": {str(i): name for name, i in numbers.items()}, "label2id": numbers} if numbers else {}


def write_settings(config: dict[str, Any], folder: Path) -> None:
    """A `preprocessor_config.json` of a run's section `data`, where it prepares images and none came with the model."""
    data = config["data"]
    if data.get("name") != "images" or (folder / FILE).is_file():
        return
    crop = data["image_size"] or config["model"]["image_size"]
    size, channels = data["scaled_to"] or crop, config["model"]["channels"]
    squeezed = {"height": size, "width": size}
    kind = (
        "CLIPImageProcessor"
        if data["fit"] == "cover"
        else "DeiTImageProcessor"
        if crop != size
        else "ViTImageProcessor"
    )
    found: dict[str, Any] = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": size} if data["fit"] == "cover" else squeezed,
        "resample": next(number for number, name in RESAMPLE.items() if name == data["resample"]),
        "do_center_crop": data["fit"] == "cover" or crop != size,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": channels == 3,
    }
    for name in ("mean", "std"):
        values = list(data[name])
        found[f"image_{name}"] = values * channels if len(values) == 1 else values
    (folder / FILE).write_text(json.dumps(found, indent=2) + "\n")
