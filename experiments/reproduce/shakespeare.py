"""Tiny Shakespeare at nanoGPT's CPU setting (4 layers, 4 heads, 128 wide, context 64, batch 12, 2,000 steps), at twice its rate.

nanoGPT's README gives a validation loss of 1.88, at a rate of 1e-3. The text is not shipped: give a copy of its `input.txt`
(1,115,394 characters; `.gz` is fine). Writes `results/shakespeare.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError

EXAMPLES = "  python -m experiments.reproduce.shakespeare --data path/to/input.txt"


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--data", type=Path, required=True, help="Tiny Shakespeare's input.txt, or .gz")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workdir", type=Path, default=Path("runs/shakespeare"))
    flags, _ = cli.parse(made, argv)
    if not flags.data.is_file():
        raise UserError(f"--data={flags.data}: there is no such file.")
    command = [
        sys.executable, "-m", "experiments.train", "--config=configs/gpt_chars.py",
        f"--config.data.source=text:{flags.data}", f"--config.train.seed={flags.seed}",
        f"--config.data.seed={flags.seed}", f"--workdir={flags.workdir}", "--json",
    ]  # fmt: skip
    if (flags.workdir / "checkpoints").is_dir():
        raise UserError(f"{flags.workdir} was begun before: what is left of it would be timed. Move it away.")
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        return done.returncode
    result = json.loads(done.stdout.splitlines()[-1])
    figures = {
        "validation_loss": result["eval/validation/loss"],
        "train_seconds": result["train_seconds"],
        "wall_seconds": wall,
        "published": 1.88,
        "source": "nanoGPT README, CPU setting",
    }
    write_result("shakespeare", figures, config="configs/gpt_chars.py", seed=flags.seed)
    print(f"validation loss {figures['validation_loss']:.4f} (published {figures['published']}), {wall:.0f} s in all")
    if flags.json:
        cli.print_json(figures)
    return 0


if __name__ == "__main__":
    cli.run(main)
