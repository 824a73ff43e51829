"""A student of three layers that learns SST-2 from the fine-tuned MiniLM of six, whose layers it begins with.

    make reproduce-minilm_sst2 DATA=path/to/data MODEL=path/to/all-MiniLM-L6-v2
    python -m experiments.train --config=configs/distil_sst2.py --config.data.manual_dir=path/to/data --workdir=runs/distil_sst2

Soft targets at a temperature of 2, and hidden states matched layer by layer. 13 minutes on one CPU core beside other work; 88.8 %
from a teacher with 89.9 %, and 11 minutes and 88.1 % for the same student without the teacher, `:alone`.
`:smoke` is a tiny one, in seconds; give it a source, a teacher and its tokenizer (`--config.task.teacher=RUN
--config.data.tokenizer=run:RUN`).

A teacher that speaks beforehand, once, instead of at each step; there are no hidden states to match then:

    python -m experiments.predict --run runs/minilm_sst2-0 --split train --to told.npy
    python -m experiments.train --config=configs/distil_sst2.py --config.task.teacher=None --config.task.hidden='()' --config.data.predictions=told.npy --config.data.manual_dir=path/to/data --workdir=runs/distil_sst2_told
"""

from __future__ import annotations

import ml_collections

_TEACHER = "runs/minilm_sst2-0"
_STUDENT = {"metrics": ("eval/test/accuracy", "eval/validation/accuracy"), "needs": (_TEACHER,)}
RECIPES = {
    "": _STUDENT
    | {
        "goals": ({"beside": "minilm_sst2", "seed": 0, "times": 0.97}, {"beside": "distil_sst2-alone"}),
        "title": "a student of 3 of the fine-tuned MiniLM's 6 layers, distilled on SST-2: accuracy on GLUE's dev set",
        "tried": "from a teacher with 0.8991 as well whose rate fell, 0.8911, alone 0.8796; in float32 and another order of the examples, from one"
        " with 0.8968, 0.9014, alone 0.8796",
        "published": "97 % of the teacher's score (Sanh et al. 2019, DistilBERT, over all of GLUE)",
    },
    "alone": _STUDENT | {"title": "the same student without the teacher"},
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "alone", "smoke"):
        raise ValueError(f"distil_sst2.py takes ':alone', ':smoke' or nothing, not {arguments!r}.")
    task = {
        "name": "distillation",
        "teacher": _TEACHER,
        "task": {"name": "classification"},
        "temperature": 2.0,
        "soft_weight": 0.9,
        "hidden": ((0, 0), (1, 2), (2, 4), (3, 6)),
        "hidden_weight": 1.0,
    }
    config = ml_collections.ConfigDict(
        {
            "model": {
                "name": "bert",
                "variant": "minilm-l6",
                "layers": 3,
                "outputs": ("classes",),
                "dropout": 0.1,
                "attention_dropout": 0.1,
                "matmul_dtype": "bfloat16",
            },
            "task": {"name": "classification"} if arguments == "alone" else task,
            "data": {
                "name": "examples",
                "source": "tfds:experiments.reproduce.datasets:Sst2",
                "text": "sentence",
                "tokenizer": "run:runs/minilm",
                "seq_len": 64,
                "batch_size": 32,
            },
            "optim": {
                "lr": 1e-4,
                "schedule": "linear",
                "end_factor": 0.0,
                "warmup_steps": 200,
                "weight_decay": 0.01,
            },
            "train": {"steps": 3000, "eval_every": 0},
            "checkpoint": {"init_from": _TEACHER, "layers": (1, 3, 5), "every": 500},
            "evals": {"validation": {"split": "validation"}, "test": {"split": "test"}},
        }
    )
    if arguments == "smoke":
        config.model.update({"variant": "mini", "layers": 1, "width": 32, "max_len": 64})
        config.task.update({"hidden": ((1, 1),)})
        config.data.update({"text": "text", "batch_size": 16})
        config.optim.update({"lr": 3e-3, "warmup_steps": 2})
        config.train.update({"steps": 60, "eval_every": 30})
        config.checkpoint.update({"init_from": None, "layers": None})
        del config.evals.test
    return config
