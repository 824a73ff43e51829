"""Llama 2's 7 B shape on a pod, to be planned before it is rented, and trained on your own text.

    python -m experiments.plan --config=configs/llama_7b.py --topology=v5p:4x4x4
    python -m experiments.train --config=configs/llama_7b.py '--config.data.source=jsonl:text/*.jsonl' --workdir=runs/llama_7b

4,096 tokens a row, bfloat16 activations, parameters and moments split over all chips (ZeRO-3), layers scanned and computed again
in the backward pass. 2 M tokens a step. The vocabulary is trained on the text; `data.tokenizer=file:PATH` takes another
of at most 32,000 pieces. `:smoke` is the same thing in seconds: tiny, on your Python's standard library.
"""

from __future__ import annotations

import ml_collections


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"llama_7b.py takes ':smoke' or nothing, not {arguments!r}.")
    smoke = arguments == "smoke"
    config = ml_collections.ConfigDict(
        {
            "model": {
                "name": "gpt",
                "variant": "llama2-7b",
                "dtype": "bfloat16",
                "layer_loop": "scan",
                "remat": "full",
            },
            "data": {
                "name": "tokens",
                "source": "stdlib",
                "tokenizer": "bpe:32000",
                "seq_len": 4096,
                "batch_size": 512,
            },
            "optim": {
                "lr": 3e-4,
                "schedule": "cosine",
                "end_factor": 0.1,
                "warmup_steps": 2000,
                "options": {"b2": 0.95},
            },
            "mesh": {"data": 1, "fsdp": -1},
            "train": {"steps": 250_000, "eval_every": 5000},
            "checkpoint": {"every": 1000},
            "evals": {"validation": {"split": "validation", "max_batches": 50}},
        }
    )
    if smoke:
        config.model.update({"variant": "llama-mini", "layers": 2, "width": 64, "mlp_width": 192, "max_len": 64})
        config.data.update({"tokenizer": "bytes", "seq_len": 64, "batch_size": 8})
        config.optim.update({"lr": 1e-3, "warmup_steps": 5})
        config.train.update({"steps": 20, "eval_every": 10})
        config.evals.validation.max_batches = 4
    return config
