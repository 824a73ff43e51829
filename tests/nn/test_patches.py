"""Patches against loops and a convolution; resized grids against slow numpy, and against PyTorch where it is there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.models import deit, vit
from tfm_jax.nn.patches import bicubic, patches, resize_grid
from tfm_jax.train.surgery import transfer

DRAW = np.random.default_rng(0)


def test_patches_are_in_reading_order():
    images = DRAW.normal(size=(2, 6, 9, 2)).astype(np.float32)
    rows = [
        [image[y : y + 3, x : x + 3].reshape(-1) for y in range(0, 6, 3) for x in range(0, 9, 3)] for image in images
    ]
    np.testing.assert_array_equal(patches(jnp.asarray(images), 3), np.array(rows))


def test_a_product_with_patches_is_a_convolution():
    images, kernel = DRAW.normal(size=(2, 8, 8, 3)), DRAW.normal(size=(4, 4, 3, 5))
    got = patches(jnp.asarray(images, jnp.float32), 4) @ jnp.asarray(kernel.reshape(-1, 5), jnp.float32)
    want = jax.lax.conv_general_dilated(
        jnp.asarray(images, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
        (4, 4),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(got, want.reshape(2, 4, 5), rtol=1e-4, atol=1e-4)


def cubic(grid, new):
    """Cubic convolution, a = -0.75, one output at a time, from the definition (Keys 1981, equation 4)."""

    def weight(d):
        d, a = abs(d), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    old = grid.shape[0]
    out = np.zeros((new, new, grid.shape[2]))
    for y in range(new):
        for x in range(new):
            v, u = (y + 0.5) * old / new - 0.5, (x + 0.5) * old / new - 0.5
            for j in range(int(np.floor(v)) - 1, int(np.floor(v)) + 3):
                for i in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
                    out[y, x] += weight(v - j) * weight(u - i) * grid[np.clip(j, 0, old - 1), np.clip(i, 0, old - 1)]
    return out


@pytest.mark.parametrize(("old", "new"), [(2, 5), (4, 7), (7, 4), (3, 3)])
@pytest.mark.parametrize("extra", [1, 2])
def test_grids_are_resized_bicubically(old, new, extra):
    table = DRAW.normal(size=(extra + old * old, 6)).astype(np.float32)
    got = resize_grid(jnp.asarray(table), extra + new * new, extra=extra)
    np.testing.assert_array_equal(got[:extra], table[:extra])
    want = cubic(table[extra:].reshape(old, old, 6), new)
    np.testing.assert_allclose(got[extra:].reshape(new, new, 6), want, rtol=1e-4, atol=1e-5)


def test_the_same_size_changes_nothing():
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5))


@pytest.mark.parity
@pytest.mark.parametrize(("name", "extra"), [("ViT", 1), ("DeiT", 2)])
@pytest.mark.parametrize("pixels", [24, 8])
def test_as_transformers_interpolates(name, extra, pixels):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=4
    )
    embeddings = getattr(transformers, f"{name}Model")(config).embeddings
    table = DRAW.normal(size=(extra + 16, 8)).astype(np.float32)
    embeddings.position_embeddings.data = torch.from_numpy(table)[None]
    length = extra + (pixels // 4) ** 2
    want = embeddings.interpolate_pos_encoding(torch.zeros(1, length, 8), pixels, pixels)
    got = resize_grid(jnp.asarray(table), length, extra=extra)
    np.testing.assert_allclose(got, want[0].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "extra"), [(vit, 1), (deit, 2)])
def test_a_donor_of_another_resolution(family, extra):
    """Through `transfer`, by what the family says of its table."""
    path = "embeddings/position_embedding/embedding"
    donor, want = DRAW.normal(size=(extra + 4, 3)).astype(np.float32), np.zeros((extra + 9, 3))
    fresh = {"embeddings": {"position_embedding": {"embedding": jnp.zeros((extra + 9, 3))}}}
    message = f"  {path}: donor {donor.shape}, model {want.shape} (checkpoint.resize_positions=True would interpolate)"
    with pytest.raises(UserError, match=re.escape(message)):
        transfer({path: jnp.asarray(donor)}, fresh, resize=family.RESIZE)
    found, report = transfer({path: jnp.asarray(donor)}, fresh, resize_positions=True, resize=family.RESIZE)
    assert report.resized == [path]
    want[:extra], want[extra:] = donor[:extra], cubic(donor[extra:].reshape(2, 2, 3), 3).reshape(9, 3)
    np.testing.assert_allclose(found["embeddings"]["position_embedding"]["embedding"], want, rtol=1e-4, atol=1e-5)


def test_what_is_no_square_cannot_be_resized():
    message = "Position tables of 7 and 10 rows: without the first 1 one is not a square grid, so it cannot be resized."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        resize_grid(jnp.zeros((7, 2)), 10, extra=1)
