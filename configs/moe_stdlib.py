"""A mixture of 8 experts, 2 a token, on the sources of your Python's own standard library, beside `gpt_stdlib.py`.

    python -m experiments.train --config=configs/moe_stdlib.py --workdir=runs/moe_stdlib

The blocks of `gpt_stdlib.py` with 8 experts of half its MLP's width: as much arithmetic a token, and four times the MLP's weights.
Metrics `train/router_balance` (1 is evenly), `train/router_busiest` (an expert's share over the fair one) and `train/router_dropped`
say what the router does. For `mesh.expert` above 1, set `model.expert_capacity=1.25`. `:smoke` is the same in seconds.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"moe_stdlib.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    steps = 20 if smoke else 420
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "gpt", "variant": "moe-mini"},
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
        config.model.update({"layers": 2, "width": 64, "mlp_width": 96, "max_len": 64, "experts": 4})
        config.data.update({"tokenizer": "bytes", "seq_len": 64, "batch_size": 8})
        config.evals.validation.max_batches = 4
    return config
