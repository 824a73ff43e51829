"""Plan models on pods, as their configs are and as a search finds them fastest: `results/plan/NAME.json`, a picture, and a table.

What is there is not compiled again, so a stopped command goes on; `--again` does. The table is drawn from the files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import cli
from experiments.reproduce.record import RESULTS, write_result
from tfm_jax.errors import UserError, nearest
from tfm_jax.files import write_atomic

EXAMPLES = """\
  python -m experiments.reproduce.plans
  python -m experiments.reproduce.plans gpt2_v5e_2x4 --search=8 --again"""


class Pod(NamedTuple):
    """What is planned: a config, a topology, flags that this topology needs, a published MFU of something alike, and what is
    missing."""

    config: str
    topology: str
    flags: tuple[str, ...] = ()
    published: str = ""
    note: str = ""


_V5P = "65-71 % (MaxText, v5p)"
_V5E = "55-67 % (MaxText, v5e)"
PODS = {
    "gpt2_v5e_2x4": Pod("configs/pod.py:gpt2", "v5e:2x4", (), _V5E),
    "llama_7b_v5p_4x4x4": Pod("configs/llama_7b.py", "v5p:4x4x4", (), _V5P),
    "llama_7b_v6e_16x16": Pod("configs/llama_7b.py", "v6e:16x16", (), "45 % (MaxText, 8 B on v6e-256)"),
    "llama_7b_2xv5e_16x16": Pod("configs/llama_7b.py", "2xv5e:16x16", ("--config.mesh.data=2",), _V5E),
    "llama_70b_v5p_8x8x16": Pod("configs/pod.py:llama_70b", "v5p:8x8x16", (), _V5P),
    "mixtral_8x7b_v5p_8x8x8": Pod("configs/pod.py:mixtral_8x7b", "v5p:8x8x8"),
    "vit_large_v5e_4x4": Pod(
        "configs/pod.py:vit_large", "v5e:4x4", (), _V5E, "no attention kernel: 197 positions are no multiple of 128"
    ),
    "t5_3b_v5e_4x4": Pod(
        "configs/pod.py:t5_3b", "v5e:4x4", (), _V5E, "no attention kernel: none adds a learned bias to the scores"
    ),
    # Here, where the prediction can be held against the clock.
    "gpt_stdlib_cpu": Pod("configs/gpt_stdlib.py", "cpu:1", ("--measure",)),
}


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("names", nargs="*", help=f"of {', '.join(PODS)}; all by default")
    made.add_argument("--search", type=int, default=4, metavar="N", help="choices to compile besides the config's own")
    made.add_argument("--again", action="store_true", help="also what is there already")
    made.add_argument("--results", type=Path, default=RESULTS / "plan", help="folder of NAME.json")
    flags, _ = cli.parse(made, argv)
    for name in flags.names:
        if name not in PODS:
            raise UserError(f"{name!r} is not planned here.{nearest(name, PODS)}")
    missed = []
    for name in flags.names or PODS:
        if flags.again or not (flags.results / f"{name}.json").is_file():
            print(f"{name} ...", flush=True)
            if not _plan(name, flags.search, flags.results):
                missed.append(name)
    records = {name: flags.results / f"{name}.json" for name in PODS}
    rows = {name: json.loads(path.read_text()) for name, path in records.items() if path.is_file()}
    text = table(rows)
    flags.results.mkdir(parents=True, exist_ok=True)
    write_atomic(flags.results / "README.md", text.encode())
    print(text, end="")
    if flags.json:
        cli.print_json({"planned": sorted(rows), "missed": missed})
    return 1 if missed else 0


def _plan(name: str, search: int, folder: Path) -> bool:
    pod = PODS[name]
    command = [
        sys.executable, "-m", "experiments.plan", f"--config={pod.config}", f"--topology={pod.topology}", *pod.flags,
        f"--picture={folder / name}.png", "--json", *([] if pod.topology.startswith("cpu") else [f"--search={search}"]),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    print(done.stdout, flush=True)
    if not lines or not lines[-1].startswith("{"):
        return False
    write_result(name, json.loads(lines[-1]), config=pod._asdict(), folder=folder)
    return done.returncode == 0


_ABOUT = """\
`make reproduce-plans` wrote this page. Memory and traffic are the TPU compiler's. Times are a roofline: products at the data
sheet's rate, traffic that the compiler has put behind other work hidden by it. On a chip products reach less than that rate, so
the predicted MFU is what a run cannot pass; the published figures were measured."""


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The records as a page: what each needs as its config is, and as the search found it fastest."""
    header = (
        "model, topology", "parameters", "GiB a chip", "step", "MFU", "bottleneck", "compiled in", "found",
        "GiB a chip", "step", "MFU", "bottleneck", "published MFU", "beyond the model's products", "measured",
    )  # fmt: skip
    rows = [header, ("---",) * len(header)]
    for name, record in records.items():
        figures, pod = record["figures"], PODS[name]
        own, *others = figures.get("tried", [figures])
        best: dict[str, Any] = next(
            (one["changes"] for one in others if one["step_seconds"] == figures["step_seconds"]), {}
        )
        changes = " ".join(f"`{key}={value}`" for key, value in best.items())
        found = (changes, *_said(figures)) if best else ("its own is the fastest" if others else "", "", "", "", "")
        took = figures.get("measured_step_seconds")
        clock = (
            "" if took is None else f"{1e3 * took:.0f} ms, the prediction {100 * figures['prediction_error']:+.0f} %"
        )
        name_and_size = (
            f"[{pod.config.removeprefix('configs/')}]({name}.png) {pod.topology}",
            f"{figures['params'] / 1e9:.3g} B",
        )
        rows.append(
            (
                *name_and_size,
                *_said(own),
                f"{own['compile_seconds']:.0f} s",
                *found,
                pod.published,
                _beyond(own, pod.note),
                clock,
            )
        )
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"# Plans\n\n{_ABOUT}\n\n{lines}\n"


def _beyond(one: Mapping[str, Any], note: str) -> str:
    """What a step takes longer for than for the model's products, in ms."""
    if not one["fits"]:
        return note
    products = one["compute_seconds"] * one["model_flops"] / one["hardware_flops"]
    parts = {
        "computed again": one["compute_seconds"] - products,
        "memory": one["memory_seconds"] - one["compute_seconds"],
    }
    for part in one["traffic"]:
        name = f"{'network' if part['network'] else 'links'} along {' and '.join(part['axes'])}"
        parts[name] = parts.get(name, 0.0) + part["exposed_seconds"]
    worst = sorted(((took, name) for name, took in parts.items() if took > 0.01 * one["step_seconds"]), reverse=True)
    return "; ".join([*(f"{name} {1e3 * took:.0f}" for took, name in worst), *([note] if note else [])])


def _said(one: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if not one["fits"]:
        return f"{one['hbm_gib_per_chip']:.1f}, too much", "", "", ""
    return (
        f"{one['hbm_gib_per_chip']:.1f}",
        f"{1e3 * one['step_seconds']:.0f} ms",
        f"{100 * one['mfu']:.1f} %",
        one["bottleneck"],
    )


if __name__ == "__main__":
    cli.run(main)
