"""Words of Wikipedia from those before them, by a Transformer-XL with a memory, and by the same model without one.

    python -m experiments.train --config=configs/lm_wikitext2.py --config.data.manual_dir=path/to/data --workdir=runs/lm_wikitext2

4 layers, 128 wide, segments of 64 words and a memory of 128, 1.4 M of WikiText-2's 2.1 M words. 35 minutes on two CPU cores that another
run shares; a perplexity of 169. `:forgetful` has no memory: 12 minutes, 183. `:smoke` is a tiny one, in seconds; give it a source.
"""

from __future__ import annotations

import ml_collections

RECIPES = {
    "": {
        "title": "WikiText-2, words: test perplexity of a Transformer-XL of 5 M weights with a memory of 128",
        "metrics": ("eval/test/perplexity", "eval/validation/perplexity"),
        "goals": ({"beside": "lm_wikitext2-forgetful", "lower": True},),
        "published": "65.6 (AWD-LSTM of 33 M weights, 750 epochs, before fine-tuning; its README)",
    },
    "forgetful": {
        "title": "the same without a memory",
        "metrics": ("eval/test/perplexity", "eval/validation/perplexity"),
    },
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "forgetful", "smoke"):
        raise ValueError(f"lm_wikitext2.py takes ':forgetful', ':smoke' or nothing, not {arguments!r}.")
    config = ml_collections.ConfigDict(
        {
            "model": {
                "name": "transformer_xl",
                "variant": "mini",
                "norm_position": "pre",
                "layers": 4,
                "width": 128,
                "heads": 4,
                "mem_len": 0 if arguments == "forgetful" else 128,
                "dropout": 0.1,
            },
            "task": {"name": "recurrent"},
            "data": {
                "name": "segments",
                "source": "tfds:experiments.reproduce.datasets:WikiText2",
                "feature": "text",
                "tokenizer": "words",
                "seq_len": 64,
                "batch_size": 32,
            },
            "optim": {"name": "muon", "lr": 6e-3, "schedule": "linear", "end_factor": 0.02, "warmup_steps": 50},
            "train": {"steps": 700, "eval_every": 350},
            "checkpoint": {"every": 250},
            "evals": {"validation": {"split": "validation"}, "test": {"split": "test"}},
        }
    )
    if arguments == "smoke":
        config.model.update({"layers": 1, "width": 32, "heads": 2, "mem_len": 8})
        config.data.update({"feature": None, "seq_len": 8, "batch_size": 8})
        config.optim.warmup_steps = 1
        config.train.update({"steps": 20, "eval_every": 10})
        del config.evals.test
    return config
