"""Vision Transformer: an image is a sequence of patches.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words". B batch, T = 1 + patches, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.nn import block, patches
from tfm_jax.nn.attention import Context
from tfm_jax.nn.heads import Classifier, classes_of
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.patches import PatchEmbedding, check_grid
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec, check_sizes
from tfm_jax.nn.stack import LayerLoop, Stack
from tfm_jax.parallel.sharding import Rule

SPEC = BlockSpec(activation="gelu", norm_eps=1e-12, init="normal")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(layers=12, width=192, heads=3),
    "small": dict(layers=12, width=384, heads=6),
    "base": dict(layers=12, width=768, heads=12),
    "large": dict(layers=24, width=1024, heads=16),
    "huge": dict(layers=32, width=1280, heads=16),
}

# Sizes of the paper, and of Touvron et al. 2021 for tiny and small; the number of classes is the data's.
VARIANTS: dict[str, dict[str, Any]] = {
    f"vit-{size}-patch{patch}-224": dict(image_size=224, patch=patch) | SIZES[size]
    for size, patch in (("tiny", 16), ("small", 16), ("base", 16), ("base", 32), ("large", 16), ("huge", 14))
}

RULES: tuple[Rule, ...] = (
    (r"head/dense/kernel$", ("fsdp", None)),
    (r"head/dense/bias$", (None,)),
    *patches.RULES,
    *block.RULES,
)
# See `models.gpt`; the head is a kernel, known by its shape.
READOUT: tuple[str, ...] = ()
# How a table of positions becomes that of another resolution; one row is the class token's.
RESIZE = ((r"position_embedding/embedding$", functools.partial(patches.resize_grid, extra=1)),)


class Model(nn.Module):
    """Classifies images by the state of a class token.

    Attributes:
      block: sizes and choices of the blocks; its fields are written flat in a config.
      image_size: height and width, in pixels.
      patch: height and width of a patch, in pixels.
      channels: of an image.
      classes: the data's own number if None.
      layers, layer_loop, remat, pipeline: see `nn.stack.Stack`.
    """

    block: BlockSpec = SPEC
    image_size: int = 224
    patch: int = 16
    channels: int = 3
    classes: int | None = None
    layers: int = 12
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        check_vision(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, Any]:
        """States and logits; under jit only what is used is computed.

        Args:
          images: (B, image_size, image_size, channels) float32, normalised.
          train: dropout on; needs an rng named `dropout` if a rate is above 0.

        Returns:
          `states` (B, T, D), the class token's first; `features` (B, D), its own; `logits` (B, classes) float32.
        """
        spec = self.block
        x = PatchEmbedding(spec, self.image_size, self.patch, self.channels, name="embeddings")(images, train=train)
        stack = Stack(spec, self.layers, self.layer_loop, self.remat, self.pipeline, name="stack")
        x, _ = stack(x, Context(Mask()), train=train)
        logits = Classifier(spec, classes_of(self), name="head")(x[:, 0])
        return {"states": x, "features": x[:, 0], "logits": logits}

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"images": jnp.zeros((batch, self.image_size, self.image_size, self.channels), jnp.float32)}


def check_vision(model: Any) -> None:
    """Refuse a vision model's sizes that cannot be."""
    check_sizes(model, "image_size", "patch", "channels", "classes", "layers")
    check_grid(model.image_size, model.patch)
