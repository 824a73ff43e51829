"""Replaced-token detection: a generator fills masked places, a discriminator says what it filled (Clark et al. 2020).

B batch, T length, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.losses.cross_entropy import linear_cross_entropy
from tfm_jax.parallel.sharding import merged
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, targets_of

# Evaluation draws the same replacements every time.
EVAL_KEY = 0


def make(*, discriminator_weight: float = 50.0, vocab_chunk: int = 0) -> Task:
    """The generator's masked-token loss, plus the discriminator's at every position (section 2).

    What the generator reads is BERT's masking, of which a tenth of the places shows the answer and a tenth a random token; the paper
    hides all of them.

    Both are means over a row's own positions, masked or all, and a row weighs as many as its positions; so the loss of a
    batch is a sum over its rows. Rows without a masked position, padding rows among them, weigh nothing.

    The batch is that of masked-token prediction: `inputs` with some `tokens` masked, `targets` (B, T) the original at
    every position, `weights` (B, T) above 0 at the masked ones. The model is called twice, as `models.electra` is.

    Args:
      discriminator_weight: lambda, of the discriminator's loss.
      vocab_chunk: the generator's loss is made this many vocabulary entries at a time; see `tasks.token_prediction`.
        Drawing the replacements still takes all logits at once.
    """
    if discriminator_weight < 0:
        raise UserError(f"task.discriminator_weight={discriminator_weight}: must be at least 0.")
    if vocab_chunk < 0:
        raise UserError(f"task.vocab_chunk={vocab_chunk}: 0 for no chunks, or the entries in one.")

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        inputs = dict(batch["inputs"])
        targets, weights = targets_of(batch), batch["weights"]
        rngs: list[Any] = [None, None]
        draw = jax.random.key(EVAL_KEY)
        if rng is not None:
            draw, *keys = jax.random.split(rng, 3)
            rngs = [{"dropout": key} for key in keys]
        guess = apply(params, **inputs, train=train, rngs=rngs[0])
        masked = weights > 0
        corrupted = jnp.where(masked, sample(draw, guess["logits"]), targets)
        del inputs["tokens"]
        found = apply(params, corrupted=corrupted, **inputs, train=train, rngs=rngs[1])["replaced_logits"]

        hidden, wanted = merged(guess["hidden"]), merged(targets, keep=0)
        nll, correct = linear_cross_entropy(hidden, guess["unembedding"], wanted, chunk=vocab_chunk)
        nll = jnp.where(masked, nll.reshape(targets.shape) * weights, 0.0)
        shown = jnp.broadcast_to(jnp.any(masked, axis=1, keepdims=True), targets.shape)
        if "valid" in inputs:
            shown = shown & inputs["valid"]
        replaced = corrupted != targets
        binary = jnp.where(shown, binary_cross_entropy(found, replaced), 0.0)

        per_row = _over(nll, weights) + discriminator_weight * _over(binary, shown)
        count = jnp.sum(shown, axis=1).astype(jnp.float32)
        total, weight = jnp.sum(per_row * count), jnp.sum(count)
        hits = correct.reshape(targets.shape) * weights
        told = jnp.where(shown, (found > 0) == replaced, False)
        metrics = {
            "loss": (total, weight),
            "generator_loss": (jnp.sum(nll), jnp.sum(weights)),
            "generator_accuracy": (jnp.sum(hits), jnp.sum(weights)),
            "discriminator_loss": (jnp.sum(binary), weight),
            "discriminator_accuracy": (jnp.sum(told).astype(jnp.float32), weight),
            "replaced": (jnp.sum(replaced & shown).astype(jnp.float32), weight),
        }
        return LossOut(total, weight, metrics, {})

    # A weight of 1 is a position that is judged, but the loss is not its negative log-likelihood.
    return Task(loss=loss, predict_fns={"replaced": _replaced}, unit="position")


def sample(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Ids (B, T) int32 drawn from softmax(logits) by the Gumbel trick; no gradient passes."""
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return jnp.argmax(logits + jax.random.gumbel(key, logits.shape), axis=-1).astype(jnp.int32)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log sigmoid(logit) where the label is true, -log sigmoid(-logit) where it is not."""
    return jax.nn.softplus(jnp.where(labels, -logits, logits))


def _over(losses_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Each row's mean (B,); 0 for a row without weight."""
    weight = jnp.sum(weights_BT, axis=1).astype(jnp.float32)
    return jnp.sum(losses_BT, axis=1) / jnp.where(weight > 0, weight, 1.0)


def _replaced(apply: Apply, params: Params, extra: Extra, batch: Any) -> dict[str, Any]:
    """The logits of each of the inputs' tokens having been replaced, (B, T) float32."""
    inputs = dict(batch["inputs"])
    tokens = inputs.pop("tokens")
    return {"logits": apply(params, corrupted=tokens, **inputs, train=False)["replaced_logits"]}
