"""Vision Transformer with a distillation token beside the class token.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention".
B batch, T = 2 + patches, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.models import vit
from tfm_jax.nn import patches
from tfm_jax.nn.attention import Context
from tfm_jax.nn.heads import Classifier, classes_of
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.patches import PatchEmbedding
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.nn.stack import LayerLoop, Stack

VARIANTS: dict[str, dict[str, Any]] = {
    f"deit-{size}-distilled-patch16-224": dict(image_size=224, patch=16) | vit.SIZES[size]
    for size in ("tiny", "small", "base")
}
RULES = vit.RULES
READOUT = vit.READOUT
RESIZE = ((r"position_embedding/embedding$", functools.partial(patches.resize_grid, extra=2)),)


class Model(nn.Module):
    """Classifies images by the states of a class token and a distillation token, each with a head of its own.

    Fields are those of `models.vit.Model`.
    """

    block: BlockSpec = vit.SPEC
    image_size: int = 224
    patch: int = 16
    channels: int = 3
    classes: int | None = None
    layers: int = 12
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        vit.check_vision(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, Any]:
        """States and logits; under jit only what is used is computed.

        Args:
          images: (B, image_size, image_size, channels) float32, normalised.
          train: dropout on; needs an rng named `dropout` if a rate is above 0.

        Returns:
          `states` (B, T, D), the class and the distillation token's first; `features` (B, D), the class token's;
          `class_logits` and `distillation_logits` (B, classes) float32, and `logits`, their mean (section 3.3 of the
          paper, "late fusion").
        """
        spec, extra = self.block, ("class_token", "distillation_token")
        embed = PatchEmbedding(spec, self.image_size, self.patch, self.channels, extra, name="embeddings")
        x = embed(images, train=train)
        stack = Stack(spec, self.layers, self.layer_loop, self.remat, self.pipeline, name="stack")
        x, _ = stack(x, Context(Mask()), train=train)
        classes = classes_of(self)
        by_class = Classifier(spec, classes, name="class_head")(x[:, 0])
        by_teacher = Classifier(spec, classes, name="distillation_head")(x[:, 1])
        return {
            "states": x,
            "features": x[:, 0],
            "class_logits": by_class,
            "distillation_logits": by_teacher,
            "logits": (by_class + by_teacher) / 2,
        }

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"images": jnp.zeros((batch, self.image_size, self.image_size, self.channels), jnp.float32)}
