"""Longformer, masked tokens on the sources of your Python's own standard library, 512 at a time.

    python -m experiments.train --config=configs/longformer_stdlib.py --workdir=runs/longformer_stdlib

4 layers, 256 wide, 64 tokens to each side; 300 steps of 4 x 512 tokens. Seen on two busy CPU cores: 2 seconds a step, a
training loss of 6.23 nats a hidden token after 70 steps. `:smoke` is the same thing in seconds.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"longformer_stdlib.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    steps = 20 if smoke else 300
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "longformer", "variant": "mini"},
            "data": {
                "name": "tokens",
                "source": "stdlib",
                "tokenizer": "bpe:4096",
                "objective": "mask",
                "seq_len": 512,
                "batch_size": 4,
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
        config.model.update({"layers": 2, "width": 32, "window": 16, "max_len": 100})
        config.data.update({"tokenizer": "bytes", "seq_len": 100, "batch_size": 8})
        config.evals.validation.max_batches = 4
    return config
