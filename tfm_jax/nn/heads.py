"""What stands on an encoder's states. B batch, T length, D width, E width of the token table, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn.linear import ACTIVATIONS, Dense, Norm, matmul
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain

RULES: tuple[Rule, ...] = (
    (r"token_head/(transform/kernel|transform/bias|bias)$", (None,)),
    (r"(pooler|pair_head|span_head|class_head\w*)/dense/kernel$", ("fsdp", None)),
    (r"(pooler|pair_head|span_head|class_head\w*)/dense/bias$", (None,)),
)

# What an encoder may say of its states.
Output = Literal["tokens", "pooled", "pair", "classes", "tags", "span", "embedding"]
# What stands for a text: its first position (Devlin et al. 2019), or the mean of all (Reimers and Gurevych 2019), for encoders whose
# first position nothing was trained to fill.
Pooling = Literal["first", "mean"]
# Of these one at most: each would be the logits. Heads by name are of a class or of tags, as their tasks ask.
_LOGITS = ("tokens", "classes", "tags")

Classes = int | Mapping[str, int] | None


def check_outputs(outputs: Sequence[Output], classes: Classes) -> None:
    rivals = [name for name in _LOGITS if name in outputs]
    if len(rivals) > 1 and ("tokens" in rivals or isinstance(classes, int)):
        both = " and ".join(map(repr, rivals[:2]))
        hint = "" if "tokens" in rivals else " Both are for a mixture of tasks, whose heads have names (model.classes)."
        raise UserError(f"model.outputs={tuple(outputs)}: both {both} would be the logits. Give one.{hint}")


def classes_of(model: Any) -> int:
    """The field `classes`, once it is set."""
    if model.classes is None:
        raise UserError("model.classes is not set, and no data set has filled it in.")
    if isinstance(model.classes, Mapping):
        raise UserError(
            f"model.classes={dict(model.classes)}: several heads by name are for encoders of text (BERT, ALBERT, ELECTRA, Longformer)."
        )
    classes: int = model.classes
    return classes


def predictions(model: Any, x: jax.Array, table: jax.Array, valid: jax.Array | None, *, train: bool) -> dict[str, Any]:
    """What an encoder's `outputs` ask for, from its states (B, T, D), token table (V, E) and where its tokens are (B, T).

    From the model's compact method.

    Returns:
      for `tokens` `hidden`, `unembedding` and `logits` (B, T, V) float32; for `pooled`, `pair` and `classes` `pooled`
      (B, D); for `pair` `pair_logits` (B, 2), for `classes` `logits` (B, C), from what dropout leaves of `pooled`; for `tags`
      `logits` (B, T, C), from what it leaves of the states; for `span` `span_logits` (B, T, 2) of each position beginning and
      ending a stretch; for `embedding` `embedding` (B, D). Where heads have names, `logits` of classes and `tag_logits` are
      dicts by name of what each head would say, of which a task reads one.
    """
    spec: BlockSpec = model.block
    asked, out = {*model.outputs}, dict[str, Any]()
    named = None
    if isinstance(model.classes, Mapping):
        named = {name: Classifier(spec, count, name=f"class_head_{name}") for name, count in model.classes.items()}
    if "tokens" in asked:
        out |= TokenHead(spec, name="token_head")(x, table)
    if asked & {"pooled", "pair", "classes"}:
        one = mean(x, valid) if model.pooling == "mean" else x[:, 0]
        out["pooled"] = Pooler(spec, name="pooler")(one)
    if "pair" in asked:
        out["pair_logits"] = Classifier(spec, 2, name="pair_head")(out["pooled"])
    if "span" in asked:
        out["span_logits"] = Classifier(spec, 2, name="span_head")(x)
    if "embedding" in asked:
        out["embedding"] = sentence_embedding(x, valid)
    if "tags" in asked:
        kept = nn.Dropout(spec.dropout, deterministic=not train)(x) if spec.dropout else x
        if named is not None:
            out["tag_logits"] = {name: head(kept) for name, head in named.items()}
        else:
            out["logits"] = Classifier(spec, classes_of(model), name="class_head")(kept)
    if "classes" in asked:
        pooled = nn.Dropout(spec.dropout, deterministic=not train)(out["pooled"]) if spec.dropout else out["pooled"]
        if named is not None:
            out["logits"] = {name: head(pooled) for name, head in named.items()}
        else:
            out["logits"] = Classifier(spec, classes_of(model), name="class_head")(pooled)
    return out


def mean(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The mean of a text's states (B, T, D), marks included, (B, D) in their dtype."""
    kept = jnp.ones(x.shape[:2], jnp.float32) if valid is None else valid.astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", x.astype(jnp.float32), kept)
    return (total / jnp.maximum(jnp.sum(kept, axis=1, keepdims=True), 1.0)).astype(x.dtype)


def sentence_embedding(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The mean of a text's states (B, T, D), marks included, as a unit vector (B, D) float32 (Reimers and Gurevych 2019)."""
    one = mean(x.astype(jnp.float32), valid)
    return one * jax.lax.rsqrt(jnp.maximum(jnp.sum(one**2, axis=-1, keepdims=True), 1e-24))


def unembed(spec: BlockSpec, hidden: jax.Array, unembedding: jax.Array) -> dict[str, Any]:
    """The outputs that losses over a vocabulary read: `hidden` in the compute dtype, `unembedding` in float32, or in
    `matmul_dtype` where that is another, to which its gradient from a loss is rounded then, and their product `logits` in
    float32."""
    logits = matmul(hidden, unembedding.T, operand_dtype=spec.operand_dtype).astype(jnp.float32)
    table = unembedding if spec.operand_dtype == spec.compute_dtype else unembedding.astype(spec.operand_dtype)
    return {"hidden": hidden, "unembedding": table, "logits": constrain(logits, ("rows", "length", "vocab"))}


def with_bias(hidden: jax.Array, unembedding: jax.Array, bias_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same product with a bias: a column of ones beside the states, and the bias beside the table."""
    ones = jnp.ones((*hidden.shape[:-1], 1), hidden.dtype)
    return jnp.concatenate([hidden, ones], axis=-1), jnp.concatenate([unembedding, bias_V[:, None]], axis=-1)


class TokenHead(nn.Module):
    """Masked-token prediction: norm(act(x W + b)) times the token table, plus a bias (Devlin et al. 2019)."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array, table_VE: jax.Array) -> dict[str, Any]:
        """(B, T, D) states to `hidden` (B, T, E + 1), `unembedding` (V, E + 1) and `logits` (B, T, V) float32."""
        spec = self.spec
        init = nn.initializers.normal(spec.init_std)
        x = Dense(table_VE.shape[1], spec.bias, spec.compute_dtype, init, name="transform")(x)
        x = Norm(spec, name="norm")(ACTIVATIONS[spec.activation](x))
        bias = self.param("bias", nn.initializers.zeros_init(), (table_VE.shape[0],), jnp.float32)
        return unembed(spec, *with_bias(x, table_VE, bias))


class Pooler(nn.Module):
    """tanh(W x + b) of (B, D), the first position or the mean of all."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.spec.init_std)
        return jnp.tanh(Dense(x.shape[-1], "all", self.spec.compute_dtype, init, name="dense")(x))


class Classifier(nn.Module):
    """A linear layer to the logits of a few classes, in float32."""

    spec: BlockSpec
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.spec.init_std)
        return Dense(self.classes, "all", self.spec.compute_dtype, init, name="dense")(x).astype(jnp.float32)
