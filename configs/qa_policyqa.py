"""all-MiniLM-L6-v2 fine-tuned to find answers in privacy policies, and tried on SQuAD's questions without having seen any.

    python -m experiments.convert --from hf:path/to/all-MiniLM-L6-v2 --to runs/minilm
    python -m experiments.train --config=configs/qa_policyqa.py --config.data.manual_dir=path/to/data --workdir=runs/qa_policyqa

The published train file is not to be had, so it trains on 16 of the 20 sites of the dev file. `test` is the published one,
`xquad` the 1,190 English questions of XQuAD. 47 minutes on two CPU cores that another run shares; F1 42.9, and 11.1 on XQuAD.
`:smoke` is a tiny network from scratch, in seconds; give it a source.
"""

from __future__ import annotations

import ml_collections

RECIPES = {
    "": {
        "title": "all-MiniLM-L6-v2 fine-tuned on PolicyQA's dev file: F1 on the test sites",
        "metrics": ("eval/test/f1", "eval/test/exact_match", "eval/xquad/f1", "eval/xquad/exact_match"),
        "published": "F1 55.3, EM 27.6 (the authors' BERT-base, trained on the train file, which has 4.5 times the questions)",
        "model": "runs/minilm",
    }
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    if arguments not in ("", "smoke"):
        raise ValueError(f"qa_policyqa.py takes ':smoke' or nothing, not {arguments!r}.")
    config = ml_collections.ConfigDict(
        {
            "model": {
                "name": "bert",
                "variant": "minilm-l6",
                "outputs": ("span",),
                "dropout": 0.1,
                "attention_dropout": 0.1,
            },
            "task": {"name": "span_extraction"},
            "data": {
                "name": "questions",
                "source": "tfds:experiments.reproduce.datasets:PolicyQa",
                "tokenizer": "run:runs/minilm",
                "seq_len": 256,
                "overlap": 64,
                "batch_size": 16,
            },
            "optim": {
                "lr": 2e-4,
                "schedule": "linear",
                "end_factor": 0.0,
                "warmup_steps": 50,
                "weight_decay": 0.01,
            },
            "train": {"steps": 1000, "eval_every": 0},
            "checkpoint": {"init_from": "runs/minilm", "every": 50},
            "evals": {
                # A tenth of the answers in policies are whole sentences, longer than SQuAD's.
                "validation": {"name": "squad", "split": "validation", "longest": 100},
                "test": {"name": "squad", "split": "test", "longest": 100},
                "xquad": {
                    "name": "squad",
                    "split": "validation",
                    "data": {"source": "tfds:experiments.reproduce.datasets:XquadEn", "split": "all"},
                },
            },
        }
    )
    if arguments == "smoke":
        config.model.update({"variant": "mini", "layers": 1, "width": 32, "heads": 2, "max_len": 64})
        config.data.update({"tokenizer": "wordpiece:400", "seq_len": 32, "overlap": 4, "longest_question": 8})
        config.optim.update({"lr": 1e-2, "warmup_steps": 10})
        config.train.update({"steps": 120, "eval_every": 60})
        config.checkpoint.init_from = None
        del config.evals.test
        del config.evals.xquad
    return config
