"""A GPT on the sources of your Python's own standard library: the main job, `make pretrain`.

    python -m experiments.train --config=configs/gpt_stdlib.py --workdir=runs/gpt_stdlib

4 layers, 256 wide, Llama's block, byte-level BPE of 4,096 pieces, 420 steps of 16 x 256 tokens. On two CPU cores in about
5 minutes of training: at most 1.45 bits per byte on the held-out files, where `xz -9` needs 1.66. `:smoke` is the
same thing in seconds: a byte vocabulary, a tiny model, 20 steps.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"gpt_stdlib.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    steps = 20 if smoke else 420
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "gpt", "variant": "llama-mini"},
            "data": {"name": "tokens", "source": "stdlib", "tokenizer": "bpe:4096", "seq_len": 256, "batch_size": 16},
            "optim": {
                "name": "muon",
                "lr": 6e-3,
                "schedule": "linear",
                "end_factor": 0.05,
                "warmup_steps": 10,
            },
            "train": {"steps": steps, "eval_every": steps // 4},
            "checkpoint": {"every": 20},
            "evals": {"validation": {"split": "validation"}},
        }
    )
    if smoke:
        config.model.update({"layers": 2, "width": 64, "mlp_width": 192, "max_len": 64})
        config.data.update({"tokenizer": "bytes", "seq_len": 64, "batch_size": 8})
        config.evals.validation.max_batches = 4
    return config
