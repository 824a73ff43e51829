"""How another library prepares images, as our section `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfm_jax.convert.huggingface import read_json
from tfm_jax.errors import UserError

FILE = "preprocessor_config.json"
# Numbers of Pillow's filters.
RESAMPLE = {2: "bilinear", 3: "bicubic"}


def read_settings(folder: Path) -> dict[str, Any]:
    """Sizes, cut and normalisation of a `preprocessor_config.json`; nothing without one.

    Raises:
      UserError: it prepares images in another way than `data.images` can.
    """
    if not (folder / FILE).is_file():
        return {}
    theirs, lines = read_json(folder / FILE), []
    size, cut = _side(theirs.get("size", 224)), theirs.get("do_center_crop", False)
    crop = _side(theirs.get("crop_size", 224)) if cut else size
    if size is None or crop is None:
        lines.append(f"size={theirs.get('size')!r}, crop_size={theirs.get('crop_size')!r}: squares only")
    for name, usual in (("do_resize", True), ("do_rescale", True), ("rescale_factor", 1 / 255)):
        if abs(theirs.get(name, usual) - usual) > 1e-9:
            lines.append(f"{name}={theirs[name]!r}: only {usual!r}")
    if theirs.get("resample", 2) not in RESAMPLE:
        lines.append(f"resample={theirs['resample']!r}: only {', '.join(map(str, RESAMPLE))}")
    if lines:
        raise UserError(f"{folder / FILE} prepares images as `data.images` cannot:\n  " + "\n  ".join(lines))
    normal = theirs.get("do_normalize", True)
    # A side alone is the shorter one; height and width squeeze the image.
    keeps = isinstance(theirs.get("size"), dict) and "shortest_edge" in theirs["size"]
    return {
        "image_size": crop,
        "scaled_to": size,
        "fit": "cover" if keeps else "squeeze",
        "resample": RESAMPLE[theirs.get("resample", 2)],
        "mean": theirs.get("image_mean", (0.5, 0.5, 0.5)) if normal else (0.0,),
        "std": theirs.get("image_std", (0.5, 0.5, 0.5)) if normal else (1.0,),
    }


def _side(size: Any) -> int | None:
    """224, {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    sides = set(size.values()) if isinstance(size, dict) else {size}
    return int(sides.pop()) if len(sides) == 1 else None
