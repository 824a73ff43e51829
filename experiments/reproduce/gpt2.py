"""A GPT-2 of 124 M random parameters: saved by `transformers`, imported here, and both made to generate greedily."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NEW, PROMPT = 100, list(range(5, 21))


def main() -> None:
    """Save it, and import it in a process of its own, whose seconds and memory count; one JSON line."""
    import torch
    import transformers

    from tfm_jax.data.vocabularies import byte_tokenizer

    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model.save_pretrained(folder / "theirs")
    byte_tokenizer().save(folder / "theirs")
    command = [sys.executable, "-m", "experiments.convert", f"--from=hf:{folder / 'theirs'}"]
    began = time.perf_counter()
    subprocess.run([*command, f"--to={folder / 'run'}"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # What a process of this library holds before it has read anything.
    idle = "import resource, jax, experiments.convert, tfm_jax.train.checkpoint as c; jax.devices(); "
    idle += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    base = int(subprocess.run([sys.executable, "-c", idle], check=True, stdout=subprocess.PIPE, text=True).stdout)
    weights = sum(p.numel() for p in model.parameters()) * 4 / 1024
    print(json.dumps({"seconds": seconds, "memory": (peak - base) / weights}))


def ours(folder: str, batch: int) -> Callable[[], float]:
    from tfm_jax.decode.sample import Sampling, generate
    from tfm_jax.sections import build_model
    from tfm_jax.train import rundir
    from tfm_jax.train.restore import load_params

    run = Path(folder) / "run"
    model = build_model(rundir.read_config(run)["model"])
    params, _ = load_params(run)

    def step() -> float:
        made = generate(model, params, [PROMPT] * batch, max_new=NEW, sampling=Sampling(temperature=0))
        return float(len(made[0]))

    return step


def theirs(folder: str, batch: int) -> Callable[[], float]:
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(Path(folder) / "theirs").eval()
    ids = torch.tensor([PROMPT] * batch)

    def step() -> float:
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return float(made.shape[1])

    return step


if __name__ == "__main__":
    main()
