"""ALBERT, masked tokens on the sources of your Python's own standard library.

    python -m experiments.train --config=configs/albert_stdlib.py --workdir=runs/albert_stdlib

One block, 256 wide, applied 4 times; token table 64 wide; 300 steps of 16 x 128 tokens. Seen on two busy CPU cores: 1.1
seconds a step, a validation loss of 6.41 nats a hidden token after 75 steps, a training loss of 6.18 after 150. `:smoke`
is the same thing in seconds.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"albert_stdlib.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    steps = 20 if smoke else 300
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "albert", "variant": "mini", "types": 1},
            "data": {
                "name": "tokens",
                "source": "stdlib",
                "tokenizer": "bpe:4096",
                "objective": "mask",
                "seq_len": 128,
                "batch_size": 16,
            },
            "optim": {
                "name": "muon",
                "lr": 6e-3,
                "schedule": "linear",
                "end_factor": 0.05,
                "warmup_steps": 1 if smoke else 10,
            },
            "train": {"steps": steps, "eval_every": steps // 4},
            "evals": {"validation": {"split": "validation"}},
        }
    )
    if smoke:
        config.model.update({"layers": 2, "width": 32, "embedding_width": 16, "max_len": 64})
        config.data.update({"tokenizer": "bytes", "seq_len": 64, "batch_size": 8})
        config.evals.validation.max_batches = 4
    return config
