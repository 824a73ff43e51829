"""SST-2, CoLA and the STS Benchmark in one run: all-MiniLM-L6-v2 as the trunk, a head and a score for each.

    python -m experiments.convert --from hf:path/to/all-MiniLM-L6-v2 --to runs/minilm
    python -m experiments.train --config=configs/glue_mixture.py --config.data.manual_dir=path/to/data --workdir=runs/glue_mixture

Batches come from the three in proportion to the fifth root of their sizes. `:sst2`, `:cola` and `:stsb` are each of them
alone, for as many of its own batches: 13, 7 and 11 minutes on one CPU core with AMX. 35 minutes and 88.7, 28.8 (seeds 26.1 and
31.5) and 82.2 in one run, of two seeds; alone 89.0, 27.7 (seeds 25.6 and 29.7) and 83.2. `:smoke` is a tiny one in seconds, on
sources of your own: `--config.data.parts.sst2.source=jsonl:GLOB` and `cola` (`sentence`, `label`), `stsb` (`sentence1`, `sentence2`,
`score`).
"""

from __future__ import annotations

import ml_collections

_BUILDERS = "tfds:experiments.reproduce.datasets:"
_PARTS = {
    "sst2": {"name": "examples", "source": f"{_BUILDERS}Sst2", "text": "sentence"},
    "cola": {"name": "examples", "source": f"{_BUILDERS}Cola", "text": "sentence"},
    "stsb": {
        "name": "examples",
        "source": f"{_BUILDERS}Stsb",
        "text": "sentence1",
        "pair": "sentence2",
        "label": "score",
        "kind": "number",
    },
}
_TASKS = {
    "sst2": {"name": "classification"},
    "cola": {"name": "classification"},
    "stsb": {"name": "regression", "scale": 5.0},
}
# Squares of errors on a scale of 1 are a twentieth of the cross-entropies, and their gradients a tenth; Adam's steps are of its
# moments, which are those of the larger.
_WEIGHTS = {"sst2": 1.0, "cola": 1.0, "stsb": 8.0}
_SCORES = {"sst2": ("accuracy",), "cola": ("matthews",), "stsb": ("spearman",)}
# Batches of each in 4,500, about in proportion to the fifth root of its examples.
_STEPS = {"sst2": 1980, "cola": 1310, "stsb": 1210}
_TITLES = {
    "sst2": "SST-2, accuracy on GLUE's dev set",
    "cola": "CoLA, Matthews' correlation on GLUE's dev set",
    "stsb": "STS Benchmark, Spearman's correlation on the test set",
}
_PUBLISHED = {"sst2": "0.935", "cola": "0.521", "stsb": "0.858"}
_ALL = tuple(f"eval/{name}/{metric}" for name, (metric,) in _SCORES.items())
RECIPES = {
    "": {
        "title": "SST-2, CoLA and STS-B in one run: accuracy, Matthews, Spearman",
        "metrics": _ALL,
        "goals": tuple(
            {"metric": metric, "beside": f"glue_mixture-{metric.split('/')[1]}", "plus": -0.01} for metric in _ALL
        ),
        "tried": "STS-B's loss weighed as the others', products in float32: 0.8888, 0.3173 (of CoLA's in-domain half alone, where alone"
        " 0.329 ± 0.003) and 0.8172; CoLA's 1,043 sentences have a standard error of 0.03",
        "model": "runs/minilm",
    },
    **{
        name: {
            "title": f"{title}, trained alone",
            "metrics": (f"eval/{name}/{_SCORES[name][0]}",),
            "published": f"{_PUBLISHED[name]} on GLUE's test server for BERT-base, five times as large (Devlin et al. 2019, table 1)",
            "model": "runs/minilm",
        }
        for name, title in _TITLES.items()
    },
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke", *_PARTS):
        raise ValueError(f"glue_mixture.py takes ':sst2', ':cola', ':stsb', ':smoke' or nothing, not {arguments!r}.")
    names = [arguments] if arguments in _PARTS else list(_PARTS)
    config = ml_collections.ConfigDict(
        {
            "model": {
                "name": "bert",
                "variant": "minilm-l6",
                "outputs": ("classes",),
                "dropout": 0.1,
                "attention_dropout": 0.1,
                "matmul_dtype": "bfloat16",
            },
            "task": {
                "name": "mixture",
                "tasks": {name: _TASKS[name] for name in names},
                "weights": {name: _WEIGHTS[name] for name in names} if len(names) > 1 else None,
            },
            "data": {
                "name": "mixture",
                "parts": {name: _PARTS[name] for name in names},
                # Of the square root, CoLA's 650 batches among 3,000 have 0.27.
                "temperature": 5.0,
                "tokenizer": "run:runs/minilm",
                "seq_len": 64,
                "batch_size": 32,
            },
            "optim": {
                "lr": 1e-4,
                "schedule": "linear",
                "end_factor": 0.0,
                "warmup_steps": 100,
                "weight_decay": 0.01,
            },
            "train": {"steps": sum(_STEPS[name] for name in names), "eval_every": 0, "ema": 0.998},
            "checkpoint": {"init_from": "runs/minilm", "every": 500},
            "evals": {name: {"name": "scores", "split": f"{name}/test", "metrics": _SCORES[name]} for name in names},
        }
    )
    if arguments == "smoke":
        config.model.update({"variant": "mini", "layers": 1, "width": 32, "heads": 2, "max_len": 64})
        config.data.update({"tokenizer": "bytes", "batch_size": 16})
        config.optim.update({"lr": 5e-3, "warmup_steps": 10})
        config.train.update({"steps": 150, "ema": None})
        config.checkpoint.init_from = None
        for name in names:
            config.evals[name].split = f"{name}/validation"
    return config
