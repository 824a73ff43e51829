"""Write what PyTorch's `transformers` computes with tiny random models: `python -m tests.parity.make_fixtures [NAME ...]`.

Needs the extra `parity`. The files are committed, so that the tests that read them need no PyTorch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .case import Arrays
from .families import CASES

FOLDER = Path(__file__).parent / "fixtures"
SEED, GRAIN, STRIDE = 11, np.float32(1 / 64), 5


def model_of(name: str) -> Any:
    """The reference model with random weights.

    They are drawn by numpy, whose bit generators are fixed for good, and are multiples of `GRAIN` that fit in a byte.
    Every one is random, biases and norms too.
    """
    import torch
    import transformers

    case = CASES[name]
    config = getattr(transformers, case.config)(**case.fields, attn_implementation="eager")
    model = getattr(transformers, case.architecture)(config).float().eval()
    if case.prepare is not None:
        case.prepare(model)
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        for key, p in sorted(model.named_parameters()):
            if not p.requires_grad:  # computed (sinusoids)
                continue
            scale = p.ndim == 1 and key.endswith("weight")
            value = rng.normal(1.0 if scale else 0.0, 0.1 if p.ndim == 1 else 0.2, p.shape)
            p.copy_(torch.from_numpy(np.clip(np.round(value / GRAIN), -127, 127) * GRAIN))
    return model


def compute(name: str) -> Arrays:
    """`config` (JSON), `weight/NAME` as saved, `input/NAME`, `output/NAME`, and `gradient/NAME` and `loss` if asked."""
    import torch

    case, model = CASES[name], model_of(name)
    inputs = case.inputs(np.random.default_rng(SEED + 1))
    theirs = {key: torch.from_numpy(x) for key, x in inputs.items()}
    result = model(**theirs)
    out: Arrays = {f"input/{key}": x for key, x in inputs.items()}
    out |= {f"output/{key}": getattr(result, key).detach().numpy() for key in case.outputs}
    # As `save_pretrained` writes it: only what differs from the class.
    config = model.config.to_diff_dict() | {"architectures": [case.architecture]}
    out["config"] = np.array(json.dumps(config, sort_keys=True))
    shared: dict[int, str] = {}
    kept = {key: p for key, p in model.state_dict().items() if shared.setdefault(p.data_ptr(), key) == key}
    out |= {f"weight/{key}": p.detach().numpy() for key, p in as_saved(model, kept).items()}
    if case.loss is not None:
        loss = case.loss(torch, result, theirs)
        loss.backward()
        out["loss"] = loss.detach().numpy()
        # The pooler takes no part in a loss of tokens.
        found = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
        out |= {f"gradient/{key}": p.numpy() for key, p in as_saved(model, found).items()}
    return out


def as_saved(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """By the names in files, which for some classes are older than those in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    named: dict[str, Any] = revert_weight_conversion(model, tensors)
    return named


def save(path: Path, arrays: Arrays) -> None:
    """Weights in a byte each; of a matrix's gradient every fifth element, which reaches all its rows and columns."""
    out = {}
    for name, x in arrays.items():
        if name.startswith("weight/") and x.dtype == np.float32:
            exact = np.round(x / GRAIN)
            # What is computed and not drawn (sinusoids) stays as it is.
            x = exact.astype(np.int8) if np.array_equal(exact * GRAIN, x) and np.all(np.abs(exact) < 128) else x
        elif name.startswith("gradient/") and x.ndim > 1:
            x = x.reshape(-1)[::STRIDE]
        out[name] = x
    np.savez_compressed(path, **out)


def load(path: Path) -> Arrays:
    """What `save` wrote, in the original shapes; gradients that it left out are NaN."""
    with np.load(path) as stored:
        out = {name: stored[name] for name in stored}
    for name in [name for name in out if name.startswith("weight/")]:
        if out[name].dtype == np.int8:
            out[name] = out[name].astype(np.float32) * GRAIN
        weight, key = out[name], name.replace("weight/", "gradient/", 1)
        if key in out and weight.ndim > 1:
            gradient = np.full(weight.shape, np.nan, np.float32)
            gradient.reshape(-1)[::STRIDE] = out[key]
            out[key] = gradient
    return out


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        save(FOLDER / f"{name}.npz", compute(name))


if __name__ == "__main__":
    main()
