"""What a reference model is: tiny, with inputs that have padding in them.

To add one: a `Case` in a file of `families`, then `python -m tests.parity.make_fixtures NAME` (needs the extra `parity`).
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


def padded_left(rng: np.random.Generator) -> Arrays:
    """Two rows, the second padded at its beginning, with the id that positions are counted without."""
    out = tokens(rng)
    out["attention_mask"] = out["attention_mask"][:, ::-1].copy()
    out["input_ids"][out["attention_mask"] == 0] = 1
    return out


def as_text(theirs: Arrays) -> dict[str, Any]:
    """Their inputs as ours."""
    names = {"input_ids": "tokens", "token_type_ids": "token_types", "decoder_input_ids": "decoder_tokens"}
    out: dict[str, Any] = {names[k]: v.astype(np.int32) for k, v in theirs.items() if k in names}
    if "attention_mask" in theirs:
        out["valid"] = theirs["attention_mask"].astype(bool)
    if "decoder_attention_mask" in theirs:
        out["decoder_valid"] = theirs["decoder_attention_mask"].astype(bool)
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
      outputs: `{their output: ours}`, `name:i` for the last axis' i-th, compared wherever `attention_mask` (or `decoder_attention_mask`) is 1.
      loss: for families whose gradients are compared: their loss; ours is `kind`.
      kind: `next` or `own` token, or the `decoder`'s.
      prepare: changes the reference model before its weights are drawn.
    """

    architecture: str
    config: str
    fields: Mapping[str, Any]
    inputs: Callable[[np.random.Generator], Arrays] = tokens
    ours: Callable[[Arrays], dict[str, Any]] = as_text
    outputs: Mapping[str, str] = field(default_factory=lambda: {"logits": "logits"})
    loss: Callable[..., Any] | None = None
    kind: str = ""
    prepare: Callable[[Any], None] | None = None
