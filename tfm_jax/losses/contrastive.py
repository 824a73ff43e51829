"""Which of a batch's others is mine? B pairs, D width."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def in_batch(
    first_BD: jax.Array, second_BD: jax.Array, weights_B: jax.Array, temperature: float
) -> tuple[jax.Array, ...]:
    """Cross-entropy of finding each row's partner among all rows of the other side, the mean of both directions.

    InfoNCE (van den Oord et al. 2018, equation 4) with the batch's other rows as negatives, both ways as in Radford et al. 2021
    (CLIP, figure 3). Rows of weight 0 are nobody's negatives.

    Args:
      first_BD, second_BD: unit vectors; the rows at one place belong together.
      weights_B: float32, at least 0.
      temperature: divides the cosines.

    Returns:
      each row's loss (B,) in nats, and whether its partner is the nearest of the second side (B,) bool.
    """
    scores = jnp.einsum("ad,bd->ab", first_BD, second_BD, preferred_element_type=jnp.float32) / temperature
    there = weights_B > 0
    by_first = jnp.where(there[None, :], scores, -jnp.inf)
    by_second = jnp.where(there[:, None], scores, -jnp.inf)
    own = jnp.diagonal(scores)
    loss = (jax.nn.logsumexp(by_first, axis=1) + jax.nn.logsumexp(by_second, axis=0)) / 2 - own
    # A batch of nothing has no finite sum.
    return jnp.where(there, loss, 0.0), there & (jnp.argmax(by_first, axis=1) == jnp.arange(len(own)))
