"""A small T5 from scratch on 26 novels of the 19th century: spans of 15 % of the pieces to be spelled out.

    python -m experiments.train --config=configs/t5_books.py --config.data.manual_dir=path/to/data --workdir=runs/t5_books-0

3 + 3 layers, 256 wide, 600 steps of 16 x 128 pieces; 19 minutes on two CPU cores that another run shares, 5.06 nats;
`plots/loss.png` is its picture. What it makes of summaries:
`configs/scitldr.py`. `:smoke` is a tiny one, in seconds; give it a source.
"""

from __future__ import annotations

import ml_collections

RECIPES = {
    "": {
        "title": "a T5 of 7.6 M weights on 26 novels: loss of corrupted spans on two others, nats",
        "metrics": ("eval/validation/loss", "eval/validation/accuracy"),
        "picture": "loss.png",
    }
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"t5_books.py takes ':smoke' or nothing, not {arguments!r}.")
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "t5", "variant": "mini"},
            "data": {
                "source": "tfds:experiments.reproduce.datasets:Books19c",
                "feature": "text",
                "tokenizer": "bpe:8000",
                "objective": "span",
                "seq_len": 128,
                "batch_size": 16,
            },
            "optim": {"name": "muon", "lr": 6e-3, "schedule": "linear", "end_factor": 0.02, "warmup_steps": 50},
            "train": {"steps": 600, "eval_every": 100},
            "checkpoint": {"every": 100},
            "evals": {"validation": {"split": "validation"}},
        }
    )
    if arguments == "smoke":
        config.model.update({"encoder_layers": 1, "decoder_layers": 1, "width": 32, "heads": 2, "mlp_width": 64})
        config.data.update({"feature": None, "tokenizer": "bpe:300", "seq_len": 32, "batch_size": 8})
        config.optim.warmup_steps = 1
        config.train.update({"steps": 20, "eval_every": 10})
    return config
