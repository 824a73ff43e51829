"""A Transformer-XL on the sources of your Python's own standard library: segments of 128 tokens and a memory of 256.

    python -m experiments.train --config=configs/transformer_xl_stdlib.py --workdir=runs/transformer_xl_stdlib

4 layers, 256 wide, byte-level BPE of 4,096 pieces, 600 steps of 16 x 128 tokens. On two CPU cores, shared with much else,
in 41 minutes of training: 1.443 bits per byte on the held-out files, and 1.532 where the same parameters are evaluated
without their memory (`python -m experiments.evaluate --run RUN --config.model.mem_len=0`); `xz -9` needs 1.661. Training
without one (`--config.model.mem_len=0`) was measured up to step 150 only, where a memory does not help yet: 2.003 without,
2.008 with. `:smoke` is the same thing in seconds.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"transformer_xl_stdlib.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    steps = 20 if smoke else 600
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "transformer_xl", "variant": "mini", "norm_position": "pre", "mem_len": 256},
            "task": {"name": "recurrent"},
            "data": {"name": "segments", "source": "stdlib", "tokenizer": "bpe:4096", "seq_len": 128, "batch_size": 16},
            "optim": {"name": "muon", "lr": 6e-3, "schedule": "linear", "end_factor": 0.05, "warmup_steps": 10},
            "train": {"steps": steps, "eval_every": steps // 4},
            "checkpoint": {"every": 20},
            "evals": {"validation": {"split": "validation"}},
        }
    )
    if smoke:
        config.optim.warmup_steps = 1
        config.model.update({"layers": 2, "width": 64, "heads": 4, "mem_len": 32})
        config.data.update({"tokenizer": "bytes", "seq_len": 16, "batch_size": 8})
        config.evals.validation.max_batches = 4
    return config
