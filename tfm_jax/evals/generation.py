"""BLEU, chrF and ROUGE of what beam search makes of a split's sources, by sacrebleu and rouge_score (extra: metrics)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from tfm_jax.decode.beam import beam_search, check_beams
from tfm_jax.decode.inputs import check_room
from tfm_jax.errors import UserError
from tfm_jax.evals.base import Context, Evaluator, batches_of, needed

log = logging.getLogger(__name__)

Metric = Literal["bleu", "bleu_lowercase", "chrf", "rouge"]
ROUGE = ("rouge1", "rouge2", "rougeL")


def make(
    context: Context,
    *,
    split: str = "validation",
    metrics: Sequence[Metric] = ("bleu", "chrf"),
    beams: int = 5,
    length_penalty: float = 1.0,
    max_new: int = 128,
    batch_size: int = 64,
    max_batches: int | None = None,
) -> Evaluator:
    """An evaluator of a training state.

    Args:
      split: of a data set whose evaluation passes give `references` (`data.pairs`).
      metrics: see `scored`.
      beams, length_penalty, max_new: see `decode.beam.beam_search`.
      batch_size: sources at a time.
      max_batches: read only this many, evenly spaced; the whole split if None.

    Returns:
      A function from a `TrainState` to what `scored` gives, and `sentences`.

    Raises:
      UserError: no metric is asked for, a library is not installed, the data or model is not one that turns texts into texts, or
        the search has no beam or more places than the model.
    """
    if not metrics:
        raise UserError("evals: metrics is empty: give for instance ('bleu',).")
    for metric in metrics:
        needed("rouge_score" if metric == "rouge" else "sacrebleu", f"evals: {metric}")
    dataset: Any = context.data.evals(split, context.rows(batch_size))
    if not hasattr(dataset, "references"):
        raise UserError("evals: generation needs data with reference texts: data.name=pairs.")
    if not hasattr(context.model, "init_caches"):
        raise UserError("evals: generation needs a model that decodes: it has no init_caches.")
    check_beams(context.model, beams, context.data.tokenizer.end_id, context.data.tokenizer.vocab_size)
    check_room(context.model, 1, max_new)
    places = batches_of(dataset, max_batches)
    wanted = [texts for step in places for texts in dataset.references(step)]

    def evaluate(state: Any) -> dict[str, float]:
        made = written(
            context, state, dataset, beams=beams, length_penalty=length_penalty, max_new=max_new, batches=places
        )
        log.info("evals: for instance %r, where the reference is %r.", made[len(made) // 2], wanted[len(made) // 2][0])
        return scored(made, wanted, metrics) | {"sentences": float(len(made))}

    names = {name for metric in metrics for name in (ROUGE if metric == "rouge" else (metric,))}
    return Evaluator(evaluate, lambda _: {*names, "sentences"})


def written(
    context: Context,
    state: Any,
    dataset: Any,
    *,
    beams: int,
    length_penalty: float,
    max_new: int,
    batches: Sequence[int] | None = None,
) -> list[str]:
    """What beam search makes of the sources of a pass, or of some of its batches, in their order."""
    params, tokenizer = context.task.eval_params(state.params, state.extra), context.data.tokenizer
    made = list[str]()
    for step in range(dataset.num_batches) if batches is None else batches:
        batch = dataset.batch_at(step)
        inputs = batch["inputs"]
        found = beam_search(
            context.model,
            params,
            [[int(row[0])] for row in inputs["decoder_tokens"]],
            sources=[row[valid].tolist() for row, valid in zip(inputs["tokens"], inputs["valid"], strict=True)],
            beams=beams,
            max_new=max_new,
            length_penalty=length_penalty,
            end_id=tokenizer.end_id,
            allowed=tokenizer.vocab_size,
        )
        inside = batch["weights"].any(axis=1)
        made += [tokenizer.decode(best[0].tokens).strip() for best, real in zip(found, inside, strict=True) if real]
    return made


def scored(made: Sequence[str], wanted: Sequence[Sequence[str]], metrics: Sequence[str]) -> dict[str, float]:
    """Scores of texts, each with one reference or several, from 0 to 100.

    `bleu` (Papineni et al. 2002) and `chrf` (Popovic 2015) are of the whole corpus, with sacrebleu's own tokenization;
    `bleu_lowercase` is of lower-cased texts.
    `rouge1`, `rouge2` and `rougeL` (Lin 2004) are means of each text's F1 with Porter's stems, by its best reference.
    """
    out: dict[str, float] = {}
    if {*metrics} - {"rouge"}:
        sacrebleu = needed("sacrebleu", "evals: bleu")
        # One stream for each number of a reference; None where a text has fewer.
        streams = [[t[i] if i < len(t) else None for t in wanted] for i in range(max(map(len, wanted)))]
        if "bleu" in metrics:
            out["bleu"] = float(sacrebleu.corpus_bleu(made, streams).score)
        if "bleu_lowercase" in metrics:
            out["bleu_lowercase"] = float(sacrebleu.corpus_bleu(made, streams, lowercase=True).score)
        if "chrf" in metrics:
            out["chrf"] = float(sacrebleu.CHRF().corpus_score(made, streams).score)
    if "rouge" in metrics:
        scorer = needed("rouge_score.rouge_scorer", "evals: rouge").RougeScorer(ROUGE, use_stemmer=True)
        for kind in ROUGE:
            best = [
                max(scorer.score(t, text)[kind].fmeasure for t in texts)
                for text, texts in zip(made, wanted, strict=True)
            ]
            out[kind] = 100 * sum(best) / len(best)
    return out
