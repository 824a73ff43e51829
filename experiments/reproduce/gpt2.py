"""A GPT-2 of 124 M random parameters: saved by `transformers`, imported here, and both made to generate greedily."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from experiments import cli

NEW, PROMPT = 100, list(range(5, 21))


def main() -> None:
    """Save it, and import it in a process of its own, whose seconds and memory count; one JSON line.

    This process stays small, because a child's highest memory begins with its parent's at the fork.
    """
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["save"]:
        return save(folder)
    subprocess.run([sys.executable, "-m", "experiments.reproduce.gpt2", str(folder), "save"], check=True)
    command = [sys.executable, "-m", "experiments.convert", f"--from=hf:{folder / 'theirs'}"]
    began = time.perf_counter()
    peak = _peak([*command, f"--to={folder / 'run'}"])
    seconds = time.perf_counter() - began
    # What a process of this library holds before it has read anything.
    modules = "convert.huggingface, tfm_jax.convert.tokenizer, tfm_jax.convert.weights, tfm_jax.train.checkpoint"
    idle = f"import experiments.convert, jax, tfm_jax.{modules}; jax.devices(); jax.jit(lambda: 0)()"
    weights = (folder / "theirs" / "model.safetensors").stat().st_size
    print(json.dumps({"seconds": seconds, "memory": (peak - _peak([sys.executable, "-c", idle])) / weights}))


def save(folder: Path) -> None:
    import torch
    import transformers

    from tfm_jax.data.vocabularies import byte_tokenizer

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model.save_pretrained(folder / "theirs")
    byte_tokenizer().save(folder / "theirs")


def _peak(command: list[str]) -> int:
    """A command's highest memory in bytes."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=cli.untold())
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed; its error stands above.")
    return usage.ru_maxrss * 1024


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
