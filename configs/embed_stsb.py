"""all-MiniLM-L6-v2 on the STS Benchmark: the cosine of two sentences' embeddings learns how similar they are.

    python -m experiments.convert --from hf:path/to/all-MiniLM-L6-v2 --to runs/minilm
    python -m experiments.train --config=configs/embed_stsb.py --config.data.manual_dir=path/to/data --workdir=runs/embed_stsb

The data is `stsb/stsb-en-train.csv`, `-dev.csv` and `-test.csv`: sentence, sentence, score. Pairs that only belong together
(a question and its answer) are learnt with `task.loss=contrastive` and `data.label=None`, in a config whose evaluators want no
labels either, as `:smoke` is: each finds its partner in the batch.
8 minutes on two CPU cores that another run shares; a correlation of 0.859, which was 0.820 before.
`:smoke` is a tiny network from scratch that does so, in seconds; give it a source with the fields `text`
and `pair`.
"""

from __future__ import annotations

import ml_collections

RECIPES = {
    "": {
        "title": "all-MiniLM-L6-v2's embeddings fine-tuned on the STS Benchmark: Spearman's correlation on the test set",
        "metrics": ("eval/test/spearman", "eval/validation/spearman"),
        "published": "0.8203 before fine-tuning; 0.8467 SBERT of BERT-base, fine-tuned alike (Reimers and Gurevych 2019, table 2)",
        "model": "runs/minilm",
    }
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"embed_stsb.py takes ':smoke' or nothing, not {arguments!r}.")
    config = ml_collections.ConfigDict(
        {
            "model": {
                "name": "bert",
                "variant": "minilm-l6",
                "outputs": ("embedding",),
                "dropout": 0.1,
                "attention_dropout": 0.1,
            },
            "task": {"name": "sentence_embedding", "loss": "cosine", "scale": 5.0},
            "data": {
                "name": "examples",
                "source": "tfds:experiments.reproduce.datasets:Stsb",
                "text": "sentence1",
                "pair": "sentence2",
                "pair_as": "apart",
                "label": "score",
                "kind": "number",
                "tokenizer": "run:runs/minilm",
                "seq_len": 64,
                "batch_size": 32,
            },
            "optim": {
                "lr": 5e-5,
                "schedule": "linear",
                "end_factor": 0.0,
                "warmup_steps": 70,
                "weight_decay": 0.01,
            },
            "train": {"steps": 700, "eval_every": 180},
            "checkpoint": {"init_from": "runs/minilm", "every": 180},
            "evals": {
                name: {"name": "scores", "split": name, "metrics": ("spearman", "pearson")}
                for name in ("validation", "test")
            },
        }
    )
    if arguments == "smoke":
        config.model.update({"variant": "mini", "layers": 1, "width": 32, "heads": 2, "max_len": 64, "dropout": 0.0})
        config.task.loss = "contrastive"
        config.data.update(
            {
                "text": "text",
                "pair": "pair",
                "label": None,
                "kind": "class",
                "tokenizer": "wordpiece:200",
                "batch_size": 16,
            }
        )
        config.optim.update({"lr": 5e-3, "warmup_steps": 5})
        config.train.update({"steps": 60, "eval_every": 20})
        config.checkpoint.init_from = None
        config.evals = ml_collections.ConfigDict({"validation": {"split": "validation"}})
    return config
