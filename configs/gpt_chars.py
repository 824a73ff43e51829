"""A character-level GPT over any text, by default at nanoGPT's CPU setting with twice its learning rate.

    python -m experiments.train --config=configs/gpt_chars.py --config.data.source=text:GLOB --workdir=runs/chars

On Tiny Shakespeare (1.1 MB, the last tenth held out): a validation loss of 1.80 after 2,000 steps, a minute and a half on two CPU
cores; the nanoGPT README has 1.88 at half the rate. `:smoke` stops after 20 steps.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"gpt_chars.py takes ':smoke' or nothing, not {arguments!r}.")
    steps = 20 if arguments == "smoke" else 2000
    return ml_collections.ConfigDict(
        {
            "model": {"name": "gpt", "variant": "nano", "activation": "gelu"},
            "data": {"name": "tokens", "source": "text:*.txt", "tokenizer": "chars", "seq_len": 64, "batch_size": 12},
            # nanoGPT has 1e-3; the rest is its setting.
            "optim": {"lr": 2e-3, "warmup_steps": steps // 20, "options": {"b2": 0.99}},
            "train": {"steps": steps, "eval_every": 0},
            "checkpoint": {"every": 1000},
            "evals": {"validation": {"split": "validation"}},
        }
    )
