"""The first sentence of each abstract as its summary: ROUGE on SciTLDR's test set, `results/scitldr-lead.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.reproduce.datasets import lines, read_text
from experiments.reproduce.record import RESULTS, write_result

EXAMPLES = "  python -m experiments.reproduce.lead --data=path/to/data"


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--data", type=Path, required=True, help="folder with scitldr/test.jsonl")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the file")
    flags, _ = cli.parse(made, argv)
    from tfm_jax.evals.generation import scored

    cli.need_folder("--data", flags.data)
    rows = [json.loads(line) for line in lines(read_text(flags.data, "scitldr/test.jsonl"))]
    found = scored([row["source"][0] for row in rows], [row["target"] for row in rows], ("rouge",))
    figures = {
        "title": "SciTLDR-A: the first sentence of each abstract as its summary, ROUGE-1 likewise",
        "metric": "eval/test/rouge1",
        "mean": found["rouge1"],
        "deviation": 0.0,
        "by_seed": {"0": found["rouge1"]},
        "also": {f"eval/test/{name}": value for name, value in found.items() if name != "rouge1"},
        "goals": [],
        "published": "",
        "tried": "",
        "train_seconds": 0.0,
    }
    command = "python -m experiments.reproduce.lead --data=folder"
    write_result("scitldr-lead", figures, config={"command": command}, folder=flags.results)
    print(cli.table([(name, f"{value:.2f}") for name, value in found.items()]))
    if flags.json:
        cli.print_json(found)
    return 0


if __name__ == "__main__":
    cli.run(main)
