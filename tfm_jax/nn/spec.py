"""What the blocks of a Transformer share, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from tfm_jax.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]
# What a kernel does: make queries, write into the residual stream, or anything else.
Role = Literal["query", "residual", "other"]


def check_sizes(part: Any, *names: str) -> None:
    """Refuse fields below 1; None stands for a default.

    Raises:
      UserError: naming the first of them.
    """
    for name in names:
        value = getattr(part, name)
        sizes = {f".{key}": x for key, x in value.items()} if isinstance(value, Mapping) else {"": value}
        for key, size in sizes.items():
            if size is not None and size < 1:
                raise UserError(f"model.{name}{key}={size}: must be at least 1.")


@dataclass(frozen=True)
class BlockSpec:
    """One block: sizes, and the choices in which families differ.

    Args:
      width: size of the residual stream.
      heads: query heads.
      kv_heads: key and value heads, shared by groups of query heads (Ainslie et al. 2023); as many as `heads` if None.
      head_dim: size of one head; `width / heads` if None.
      mlp_width: hidden size of the MLP; `4 * width` if None.
      mlp: `plain` is act(x W1) W2; `gated` is (act(x Wg) * (x W1)) W2 (Shazeer 2020, "GLU variants").
      experts: of a mixture that stands for the MLP, see `nn.moe.MoE`; 0 for none.
      experts_per_token: how many of them a token goes through.
      expert_capacity: an expert's slots over a row's fair share of tokens, beyond which tokens are dropped; None drops none, and
        has every device hold every expert.
      router_balance, router_z: weights in the training loss of how unevenly the experts are used (1 is evenly), and of the
        router's log(Z)^2; the mean over layers.
      activation: `gelu` is exact, `gelu_tanh` its tanh approximation (GPT-2), `silu` makes `gated` SwiGLU.
      norm: `layer` (Ba et al. 2016) or `rms` (Zhang and Sennrich 2019).
      norm_position: `pre` normalises a sublayer's input, `post` the sum after it (Vaswani et al. 2017).
      qk_norm: `head` normalises each head's queries and keys by their RMS, before any rotation (Qwen3).
      attention_scale: scores are divided by `sqrt` of the head size, or not at all (`none`: T5).
      bias: `all` linear layers and norms carry one, or `none`.
      dropout: on embeddings, and on each sublayer's output.
      mlp_dropout: on the MLP's hidden values.
      attention_dropout: on the attention weights; needs the materialised `xla` attention.
      dtype: of activations and matrix products; parameters, norms, softmax and losses stay in float32.
      matmul_dtype: in which the products with the stack's kernels and with the table that makes a vocabulary's logits, its bias
        if it has one, take their operands, where sums and activations are in `dtype`; `dtype` if None. bfloat16 beside
        float32 is what a TPU does by itself, and faster on a CPU that has it in hardware (AMX). Attention's own products, and
        the kernels of embeddings and heads, stay in `dtype`.
      gradient_dtype: in which devices add up the gradients of the layers' kernels: `dtype` if None, or float32, which doubles
        what bfloat16 sends. Embeddings' are float32, and microbatches' are added up in float32, either way.
      attention: implementation, see `nn.attention.IMPLEMENTATIONS`; `auto` chooses by platform and says what.
      init: `gpt2` is normal with `init_std`, and `init_std / sqrt(2 * layers)` for projections into the residual stream
        (Radford et al. 2019, section 2.3); `normal` is `init_std` throughout (Devlin et al. 2019); `fan_in` is
        1/sqrt(fan in), with T5's smaller queries in place of the scale it leaves out (Raffel et al. 2020); `xavier`
        is Glorot and Bengio's 2010 (Vaswani et al. 2017).
      init_std: for `gpt2` and `normal`, and for embeddings.
    """

    width: int = 256
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    mlp: Literal["plain", "gated"] = "plain"
    experts: int = 0
    experts_per_token: int = 2
    expert_capacity: float | None = None
    router_balance: float = 0.01
    router_z: float = 0.0
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu_tanh"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    qk_norm: Literal["none", "head"] = "none"
    attention_scale: Literal["sqrt", "none"] = "sqrt"
    bias: Literal["all", "none"] = "all"
    dropout: float = 0.0
    mlp_dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: DType = "float32"
    matmul_dtype: DType | None = None
    gradient_dtype: DType | None = None
    attention: str = "auto"
    init: Literal["gpt2", "normal", "fan_in", "xavier"] = "gpt2"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_sizes(self, "width", "heads", "kv_heads", "head_dim", "mlp_width")
        if self.head_dim is None and self.width % self.heads:
            raise UserError(
                f"model.heads={self.heads} does not divide model.width={self.width}."
                f" Nearest that do: {_nearest_divisors(self.width, self.heads)}; or set model.head_dim."
            )
        if self.heads % self.groups:
            raise UserError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}."
                f" Nearest that do: {_nearest_divisors(self.heads, self.groups)}."
            )
        self._check_experts()
        if self.gradient_dtype not in (None, "float32", self.dtype):
            raise UserError(
                f"model.gradient_dtype={self.gradient_dtype!r}: products in model.dtype={self.dtype!r} give gradients in it or in"
                " float32."
            )
        if self.matmul_dtype not in (None, self.dtype) and (self.dtype, self.matmul_dtype) != ("float32", "bfloat16"):
            raise UserError(
                f"model.matmul_dtype={self.matmul_dtype!r}: operands of products are in model.dtype={self.dtype!r}, or those of"
                " float32 in bfloat16."
            )
        for name in ("dropout", "mlp_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}: a probability in [0, 1).")

    def _check_experts(self) -> None:
        if self.experts < 0:
            raise UserError(f"model.experts={self.experts}: must be at least 0.")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token}: must be from 1 to model.experts={self.experts}."
            )
        if self.expert_capacity is not None and self.expert_capacity <= 0:
            raise UserError(f"model.expert_capacity={self.expert_capacity}: must be above 0, or None.")
        if self.experts and (self.bias == "all" or self.mlp_dropout):
            raise UserError(
                "model.experts: experts have no biases and no dropout inside: model.bias='none', model.mlp_dropout=0."
            )
        if self.experts and self.gradient_dtype not in (None, self.dtype):
            raise UserError(
                f"model.gradient_dtype={self.gradient_dtype!r}: the gradients of experts are added up in model.dtype={self.dtype!r}."
            )
        if self.experts and self.matmul_dtype not in (None, self.dtype):
            raise UserError(
                f"model.matmul_dtype={self.matmul_dtype!r}: products of experts are in model.dtype={self.dtype!r}."
            )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_size(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def hidden(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    def std(self, role: Role, fan_in: int, fan_out: int, layers: int) -> float:
        """Standard deviation of a kernel's initial values in a stack of `layers`."""
        if self.init == "gpt2":
            return self.init_std / (2 * layers) ** 0.5 if role == "residual" else self.init_std
        if self.init == "fan_in":
            return (fan_in * (self.key_size if role == "query" and self.attention_scale == "none" else 1)) ** -0.5
        return (2 / (fan_in + fan_out)) ** 0.5 if self.init == "xavier" else self.init_std

    @property
    def operand_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.matmul_dtype or self.dtype)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def _nearest_divisors(total: int, wanted: int) -> str:
    divisors = sorted((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - wanted))
    return ", ".join(map(str, sorted(divisors[:2])))
