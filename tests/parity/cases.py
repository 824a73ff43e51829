"""The reference models: tiny, of every class that can be converted, with inputs that have padding in them.

To add one: a `Case` below, then `python -m tests.parity.make_fixtures NAME` (needs the extra `parity`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VOCAB, LENGTH = 61, 12
Arrays = dict[str, np.ndarray]


def tokens(rng: np.random.Generator) -> Arrays:
    """Two rows, the second padded at its end."""
    ids = rng.integers(5, VOCAB, (2, LENGTH))
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def as_text(theirs: Arrays) -> dict[str, Any]:
    """Their inputs as ours."""
    names = {"input_ids": "tokens", "token_type_ids": "token_types", "decoder_input_ids": "decoder_tokens"}
    out: dict[str, Any] = {names[k]: v.astype(np.int32) for k, v in theirs.items() if k in names}
    if "attention_mask" in theirs:
        out["valid"] = theirs["attention_mask"].astype(bool)
    return out


def next_token_loss(torch: Any, out: Any, inputs: Any) -> Any:
    logits, ids, mask = out.logits, inputs["input_ids"], inputs["attention_mask"]
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (nll * mask[:, 1:]).sum() / mask[:, 1:].sum()


def own_token_loss(torch: Any, out: Any, inputs: Any) -> Any:
    """Of predicting the input itself, which exercises the same gradients as masking would."""
    logits = out.logits if hasattr(out, "logits") else out.prediction_logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs["input_ids"], reduction="none")
    return (nll * inputs["attention_mask"]).sum() / inputs["attention_mask"].sum()


@dataclass(frozen=True)
class Case:
    """One class of the reference.

    Attributes:
      architecture: the class in `transformers`.
      config: its config class.
      fields: of that config, tiny.
      inputs: drawn from a random generator, by their names.
      ours: their inputs as ours.
      outputs: `{their output: ours}`, compared wherever `attention_mask` (or `decoder_attention_mask`) is 1.
      loss: for families whose gradients are compared: their loss; ours is `kind`.
      kind: `next` or `own` token.
    """

    architecture: str
    config: str
    fields: Mapping[str, Any]
    inputs: Callable[[np.random.Generator], Arrays] = tokens
    ours: Callable[[Arrays], dict[str, Any]] = as_text
    outputs: Mapping[str, str] = field(default_factory=lambda: {"logits": "logits"})
    loss: Callable[..., Any] | None = None
    kind: str = ""


_ROTARY = dict(
    vocab_size=VOCAB, max_position_embeddings=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, bos_token_id=0, eos_token_id=0,
)  # fmt: skip

CASES: dict[str, Case] = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        loss=next_token_loss,
        kind="next",
    ),
    "llama": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        _ROTARY | dict(rms_norm_eps=1e-5, tie_word_embeddings=False),
        loss=next_token_loss,
        kind="next",
    ),
    "llama31": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        _ROTARY
        | dict(
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8,
            ),
        ),
    ),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", _ROTARY | dict(head_dim=16, tie_word_embeddings=False)),
}  # fmt: skip
