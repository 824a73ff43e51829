"""A narrow GPT on bytes of your Python's standard library, whose learning rate holds at any width (`train.mup`).

    python -m experiments.coordinates --config=configs/gpt_mup.py --to=runs/coordinates
    python -m experiments.train --config=configs/gpt_mup.py --config.model.width=512 --workdir=runs/wide

2 layers, 4 heads, 64 wide, 150 steps of 16 x 64 bytes at 2^-7, the best rate at this width: `make reproduce-mup` sweeps it at 64 and
at 512 wide, and checks that the best is the same. `:smoke` is 20 steps, 32 wide.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"gpt_mup.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "layers": 2,
                "width": 32 if smoke else 64,
                "heads": 4,
                "max_len": 64,
                # 1 / sqrt(width) of the base: a wider model begins with what these have become by then.
                "init_std": 0.125,
            },
            "data": {"name": "tokens", "source": "stdlib", "tokenizer": "bytes", "seq_len": 64, "batch_size": 16},
            "optim": {"lr": 2**-7, "warmup_steps": 10, "options": {"b2": 0.99}},
            "train": {"steps": 20 if smoke else 150, "mup": {"width": 16 if smoke else 64}},
            "checkpoint": {"every": 0},
            "evals": {"validation": {"split": "validation", "max_batches": 64}},
        }
    )
