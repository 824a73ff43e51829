"""A small BERT by masked tokens on the sources of your Python's own standard library.

    python -m experiments.train --config=configs/bert_stdlib.py --workdir=runs/bert_stdlib

4 layers, 256 wide, 15 % of the tokens hidden, 1,000 steps of 16 x 256 tokens: about 15 minutes on two CPU cores.
`:smoke` is the same thing in seconds. The sentence pairs of the paper are left out, as in RoBERTa.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"bert_stdlib.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    steps = 20 if smoke else 1000
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "bert", "variant": "mini"},
            "data": {
                "source": "stdlib",
                "tokenizer": "bpe:4096",
                "objective": "mask",
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
        config.model.update({"layers": 2, "width": 64, "max_len": 64})
        config.data.update({"tokenizer": "bytes", "seq_len": 64, "batch_size": 8})
        config.evals.validation.max_batches = 4
    return config
