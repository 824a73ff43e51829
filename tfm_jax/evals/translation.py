"""BLEU and chrF of what beam search makes of a split's sources, by sacrebleu (extra: metrics)."""

from __future__ import annotations

import logging
from typing import Any

from tfm_jax.decode.beam import beam_search
from tfm_jax.errors import UserError
from tfm_jax.evals.base import Context, Evaluate

log = logging.getLogger(__name__)


def make(
    context: Context,
    *,
    split: str = "validation",
    beams: int = 5,
    length_penalty: float = 1.0,
    max_new: int = 128,
    batch_size: int = 64,
    max_batches: int | None = None,
    lowercase: bool = False,
) -> Evaluate:
    """An evaluator of a training state.

    Args:
      split: of a data set whose evaluation passes give `references` (`data.pairs`).
      beams, length_penalty, max_new: see `decode.beam.beam_search`.
      batch_size: sources at a time.
      max_batches: stop after this many; the whole split if None.
      lowercase: compare lower-cased texts.

    Returns:
      A function from a `TrainState` to `bleu` and `chrf` (0 to 100, of the whole corpus, sacrebleu's own tokenization),
      and `sentences`.

    Raises:
      UserError: sacrebleu is not installed, or the data or model is not one that turns texts into texts.
    """
    try:
        import sacrebleu
    except ImportError:
        raise UserError("evals: translation needs sacrebleu: pip install 'tfm_jax[metrics]'.") from None
    dataset: Any = context.data.evals(split, batch_size)
    if not hasattr(dataset, "references"):
        raise UserError("evals: translation needs data with reference texts: data.name=pairs.")
    if not hasattr(context.model, "init_caches"):
        raise UserError("evals: translation needs a model that decodes: it has no init_caches.")
    count = min(dataset.num_batches, max_batches or dataset.num_batches)
    tokenizer = context.data.tokenizer

    def evaluate(state: Any) -> dict[str, float]:
        params = context.task.eval_params(state.params, state.extra)
        made, wanted = list[str](), list[str]()
        for step in range(count):
            batch, texts = dataset.batch_at(step)["inputs"], dataset.references(step)
            rows = [row[valid].tolist() for row, valid in zip(batch["tokens"], batch["valid"], strict=True)]
            found = beam_search(
                context.model,
                params,
                [[int(row[0])] for row in batch["decoder_tokens"]],
                sources=rows,
                beams=beams,
                max_new=max_new,
                length_penalty=length_penalty,
                end_id=tokenizer.end_id,
                allowed=tokenizer.vocab_size,
            )
            made += [tokenizer.decode(best[0].tokens).strip() for best in found[: len(texts)]]
            wanted += texts
        log.info("evals: for instance %r, where the reference is %r.", made[len(made) // 2], wanted[len(made) // 2])
        scored: Any = sacrebleu
        return {
            "bleu": float(scored.corpus_bleu(made, [wanted], lowercase=lowercase).score),
            "chrf": float(scored.corpus_chrf(made, [wanted]).score),
            "sentences": float(len(made)),
        }

    return evaluate
