"""What pretraining on novels is worth: SST-2 and CoLA by the small BERT of `configs/bert_books.py`, and by the same network from
scratch.

    make reproduce-bert_books DATA=path/to/data
    make reproduce-small_bert VARIANT=sst2 DATA=path/to/data ARGS='--seeds 0 1 2'

`:sst2`, 80.4 %, and `:sst2_scratch`, 77.7 %, 8 minutes a seed on one CPU core with AMX; `:cola`, a correlation of 0.138, and
`:cola_scratch`, 0.089, 5 minutes. `:smoke` is a tiny one, in seconds; give it a source and a tokenizer.
"""

from __future__ import annotations

import ml_collections

_PRETRAINED = "runs/bert_books-0"
_SCORES = {"sst2": "eval/test/accuracy", "cola": "eval/test/matthews"}
_TITLES = {"sst2": "SST-2, accuracy on GLUE's dev set", "cola": "CoLA, Matthews' correlation on GLUE's dev set"}
_TRIED = {
    "sst2": "a rate of 1e-3, products in float32: 0.7913 ± 0.0091, and from scratch 0.7771 ± 0.0107",
    "cola": "a rate of 1e-3, products in float32: 0.1194 ± 0.0245, and from scratch 0.0879 ± 0.0176",
}
RECIPES = {
    f"{name}{ending}": {
        "title": f"{title}: the small BERT {how}",
        "metrics": (_SCORES[name],),
        "needs": (_PRETRAINED,),  # from scratch: its tokenizer
        "goals": () if ending else ({"beside": f"small_bert-{name}_scratch", "errors": 2.0},),
        "tried": _TRIED.get(f"{name}{ending}", ""),
    }
    for name, title in _TITLES.items()
    for ending, how in (("", "after the novels"), ("_scratch", "from scratch"))
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in (*RECIPES, "", "smoke"):
        raise ValueError(
            f"small_bert.py takes {', '.join(f':{name}' for name in RECIPES)} or ':smoke', not {arguments!r}."
        )
    data, _, start = arguments.partition("_")  # SST-2 if it is not said
    cola = data == "cola"
    config = ml_collections.ConfigDict(
        {
            "model": {
                "name": "bert",
                "variant": "mini",
                "norm_position": "pre",
                "init_std": 256**-0.5,
                "max_len": 64,
                "outputs": ("classes",),
                "pooling": "mean",
                "dropout": 0.1,
                "attention_dropout": 0.1,
                "matmul_dtype": "bfloat16",
            },
            "task": {"name": "classification"},
            "data": {
                "name": "examples",
                "source": f"tfds:experiments.reproduce.datasets:{'Cola' if cola else 'Sst2'}",
                "text": "sentence",
                "tokenizer": f"run:{_PRETRAINED}",
                "seq_len": 64,
                "batch_size": 32,
            },
            "optim": {
                "name": "muon",
                # SST-2's validation split, of phrases, pretrained and from scratch: 0.863 and 0.855; pretrained of 1e-3 0.849, of
                # 3e-4 0.794 (one seed).
                "lr": 3e-3,
                "schedule": "linear",
                "end_factor": 0.0,
                "warmup_steps": 80,
                "weight_decay": 0.01,
            },
            "train": {"steps": 800 if cola else 1200, "eval_every": 0},
            "checkpoint": {"init_from": None if start == "scratch" else _PRETRAINED, "every": 1000},
            "evals": {
                "validation": {"split": "validation"},
                "test": {"name": "scores", "split": "test", "metrics": ("matthews" if cola else "accuracy",)},
            },
        }
    )
    if arguments == "smoke":
        config.model.update({"layers": 1, "width": 32, "heads": 2, "max_len": 64})
        config.data.update({"text": "text", "batch_size": 16})
        config.optim.update({"lr": 2e-2, "warmup_steps": 2})
        config.train.steps = 60
        config.checkpoint.init_from = None
        config.evals.test.split = "validation"
    return config
