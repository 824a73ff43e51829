"""A small BERT from scratch on 26 novels of the 19th century: 30 % of the words hidden as wholes.

    python -m experiments.train --config=configs/bert_books.py --config.data.manual_dir=path/to/data --workdir=runs/bert_books-0

4 layers, 256 wide, norms in front, 6,000 steps of 64 x 32 pieces. 60 minutes on one CPU core with AMX; 4.16 nats.
What it is good for: `configs/small_bert.py`. `:smoke` is a tiny one, in seconds; give it a source.
"""

from __future__ import annotations

import ml_collections

RECIPES = {
    "": {
        "title": "a BERT of 4 M weights on 26 novels: loss of masked pieces on two others, nats",
        "metrics": ("eval/validation/loss", "eval/validation/accuracy"),
    }
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"bert_books.py takes ':smoke' or nothing, not {arguments!r}.")
    config = ml_collections.ConfigDict(
        {
            # With the published norms behind and normal(0.02) it learns the words' frequencies and no more in as many steps.
            "model": {
                "name": "bert",
                "variant": "mini",
                "norm_position": "pre",
                "init_std": 256**-0.5,
                "max_len": 64,
                "matmul_dtype": "bfloat16",
            },
            "data": {
                "source": "tfds:experiments.reproduce.datasets:Books19c",
                "feature": "text",
                "tokenizer": "wordpiece:4000",
                "objective": "mask",
                "mask_unit": "word",
                # Twice the 15 % of BERT: twice the lessons of a step (Wettig et al. 2023).
                "mask_rate": 0.3,
                "seq_len": 32,
                "batch_size": 64,
            },
            "optim": {
                "name": "muon",
                "lr": 1e-2,
                "schedule": "linear",
                "end_factor": 0.02,
                "warmup_steps": 50,
                # As fast to learn as with five steps, and a fifth less of them: `configs/mt_multi30k.py`.
                "options": {"preconditioning": "aol", "ns_steps": 4},
            },
            "train": {"steps": 6000, "eval_every": 3000},
            "checkpoint": {"every": 250},
            "evals": {"validation": {"split": "validation"}},
        }
    )
    if arguments == "smoke":
        config.model.update({"layers": 1, "width": 32, "heads": 2, "max_len": 32})
        config.data.update({"feature": None, "tokenizer": "wordpiece:200", "seq_len": 32, "batch_size": 8})
        config.optim.update({"lr": 6e-3, "warmup_steps": 1})
        config.train.update({"steps": 20, "eval_every": 10})
    return config
