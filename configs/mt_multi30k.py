"""English to German on Multi30k's captions, with the Transformer of 2017 and one BPE for both languages.

python -m experiments.train --config=configs/mt_multi30k.py --config.data.manual_dir=path/to/data --workdir=runs/mt_multi30k
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"mt_multi30k.py takes ':smoke' or nothing, not {arguments!r}.")
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "encdec", "variant": "mini", "dropout": 0.3},
            "task": {"name": "token_prediction", "label_smoothing": 0.1},
            "data": {
                "name": "pairs",
                "source": "tfds:experiments.reproduce.datasets:Multi30k",
                "text": "en",
                "target": "de",
                "tokenizer": "bpe:6000",
                "seq_len": 64,
                "batch_size": 128,
            },
            "optim": {
                "lr": 1.5e-3,
                "schedule": "cosine",
                "end_factor": 0.02,
                "warmup_steps": 800,
                "weight_decay": 0.01,
                "options": {"b2": 0.98},
            },
            "train": {"steps": 6000, "eval_every": 1000, "ema": 0.998},
            "checkpoint": {"every": 500, "keep": 3},
            "evals": {
                "validation": {"split": "validation"},
                "test": {"name": "translation", "split": "test", "beams": 5, "max_new": 64},
            },
        }
    )
    if arguments == "smoke":
        config.model.update({"encoder_layers": 1, "decoder_layers": 1, "width": 32, "heads": 2, "dropout": 0.0})
        config.data.update({"text": "source", "target": "target", "tokenizer": "wordpiece:40", "batch_size": 32})
        config.optim.update({"name": "muon", "lr": 2e-2, "warmup_steps": 10})
        del config.optim.options["b2"]
        config.train.update({"steps": 80, "eval_every": 20, "ema": 0.9})
        config.evals.test.update({"split": "validation", "beams": 2, "max_new": 10})
    return config
