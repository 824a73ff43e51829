"""ViT and DeiT."""

import numpy as np

from ..case import Arrays, Case

_VISION = dict(
    image_size=12, patch_size=4, num_channels=3, num_labels=7, hidden_size=32, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=48,
)  # fmt: skip


def images(rng: np.random.Generator) -> Arrays:
    """Channels first, as theirs are."""
    return {"pixel_values": rng.normal(size=(2, 3, 12, 12)).astype(np.float32)}


def channels_last(theirs: Arrays) -> Arrays:
    return {"images": theirs["pixel_values"].transpose(0, 2, 3, 1)}


CASES: dict[str, Case] = {
    "vit": Case("ViTForImageClassification", "ViTConfig", _VISION, images, channels_last),
    "deit": Case(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        _VISION | dict(hidden_act="gelu_new", num_labels=2),
        images,
        channels_last,
        outputs={
            "logits": "logits", "cls_logits": "class_logits", "distillation_logits": "distillation_logits",
        },
    ),
}  # fmt: skip
