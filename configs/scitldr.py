"""Abstracts of papers in one sentence, by the small T5 of `configs/t5_books.py`.

    make reproduce-t5_books DATA=path/to/data
    make reproduce-scitldr DATA=path/to/data

ROUGE of the best of several references. 11 minutes on two CPU cores that another run shares; ROUGE-1 17.9. The first sentence of
each abstract has 31.3 (`python -m experiments.reproduce.lead --data=path/to/data`). `:smoke` is a tiny one, in seconds; give it a
source with the fields `source`, `target` and `references`, a list of texts.
"""

from __future__ import annotations

import ml_collections

_PRETRAINED = "runs/t5_books-0"
RECIPES = {
    "": {
        "title": "SciTLDR-A by the small T5: ROUGE-1 on the test set, best of the references",
        "goals": ({"beside": "scitldr-lead"},),
        "needs": (_PRETRAINED,),
        "metrics": ("eval/test/rouge1", "eval/test/rouge2", "eval/test/rougeL"),
        "published": "43.3 / 20.8 / 35.0 (BART-large, Cachola et al. 2020)",
    }
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"scitldr.py takes ':smoke' or nothing, not {arguments!r}.")
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "t5", "variant": "mini", "dropout": 0.1},
            "task": {"name": "token_prediction", "label_smoothing": 0.1},
            "data": {
                "name": "pairs",
                "source": "tfds:experiments.reproduce.datasets:SciTldr",
                "references": "references",
                "tokenizer": f"run:{_PRETRAINED}",
                "seq_len": 384,
                "batch_size": 16,
            },
            "optim": {"lr": 1e-3, "schedule": "linear", "end_factor": 0.02, "warmup_steps": 100, "weight_decay": 0.01},
            "train": {"steps": 300, "eval_every": 150},
            "checkpoint": {"init_from": _PRETRAINED, "every": 200},
            "evals": {
                "validation": {"split": "validation"},
                "test": {"name": "generation", "split": "test", "metrics": ("rouge",), "beams": 4, "max_new": 60},
            },
        }
    )
    if arguments == "smoke":
        config.model.update({"encoder_layers": 1, "decoder_layers": 1, "width": 32, "heads": 2, "mlp_width": 64})
        config.data.update({"tokenizer": "bpe:300", "seq_len": 64, "batch_size": 8})
        config.optim.warmup_steps = 1
        config.train.update({"steps": 20, "eval_every": 10})
        config.checkpoint.init_from = None
        config.evals.test.update({"split": "validation", "beams": 2, "max_new": 8})
    return config
