"""ELECTRA, replaced tokens on the sources of your Python's own standard library.

    python -m experiments.train --config=configs/electra_stdlib.py --workdir=runs/electra_stdlib

4 layers, 256 wide, with a generator of a quarter of that on the same embeddings; 300 steps of 16 x 128 tokens. Its loss
begins near 43: 8.3 of the generator (ln 4096) and 50 times ln 2 of the discriminator. `:smoke` is the same thing in
seconds.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"electra_stdlib.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    steps = 20 if smoke else 300
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "electra", "variant": "mini", "types": 1, "generator_heads": 1},
            "task": {"name": "replaced_token"},
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
        config.model.update({"layers": 2, "width": 32, "embedding_width": 16, "generator_heads": 2, "max_len": 64})
        config.data.update({"tokenizer": "bytes", "seq_len": 64, "batch_size": 8})
        config.evals.validation.max_batches = 4
    return config
