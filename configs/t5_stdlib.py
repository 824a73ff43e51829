"""A small T5 on the sources of your Python's own standard library.

    python -m experiments.train --config=configs/t5_stdlib.py --workdir=runs/t5_stdlib

3 + 3 layers, 256 wide: 15 % of the tokens in spans of 3 on average, 1,000 steps of 16 x 256 source tokens. After 100 steps
(`--config.train.steps=100 --config.optim.warmup_steps=10 --config.evals.validation.max_batches=10`) the loss was 5.81 nats a
token. `:smoke` is the same thing in seconds.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"t5_stdlib.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    steps = 20 if smoke else 1000
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "t5", "variant": "mini"},
            "data": {
                "source": "stdlib",
                "tokenizer": "bpe:4096",
                "objective": "span",
                "seq_len": 256,
                "batch_size": 16,
            },
            "optim": {"lr": 1e-3, "warmup_steps": steps // 10},
            "train": {"steps": steps, "eval_every": steps // 4},
            "checkpoint": {"every": steps // 10},
            "evals": {"validation": {"split": "validation"}},
        }
    )
    if smoke:
        config.model.update({"encoder_layers": 2, "decoder_layers": 2, "width": 64, "mlp_width": 256})
        config.data.update({"tokenizer": "bytes", "seq_len": 64, "batch_size": 8})
        config.evals.validation.max_batches = 4
    return config
