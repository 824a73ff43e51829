"""Draw the table of recipes in a README from `results/*.json`, between the lines `<!-- results -->` and `<!-- /results -->`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reproduce.goals import check, number
from experiments.reproduce.record import RESULTS
from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic

EXAMPLES = "  python -m experiments.results"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    made.add_argument("--readme", type=Path, default=Path("README.md"))
    flags, _ = cli.parse(made, argv)
    paths = sorted(flags.results.glob("*.json"), key=lambda path: path.stem)
    records = [json.loads(path.read_text()) for path in paths]
    rows = [row(record, flags.results) for record in records if "metric" in record["figures"]]
    header = "| what | figure | asked | published | seeds | training | revision | command |\n|" + " --- |" * 8
    table = "\n".join([header, *rows]) + "\n"
    text = flags.readme.read_text() if flags.readme.is_file() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"--readme={flags.readme} has no lines {BEGIN.strip()} and {END}.")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    write_atomic(flags.readme, before + BEGIN + table + END + after)
    print(table, end="")
    if flags.json:
        cli.print_json({"rows": len(rows)})
    return 0


def row(record: Mapping[str, Any], folder: Path) -> str:
    """A recipe's line; the goals' other figures are in `folder`."""
    found = record["figures"]
    seeds, checked = found["by_seed"], [check(goal, found, folder) for goal in found["goals"]]
    asked = "; ".join(f"{words}, **missed**" if met is False else words for words, met in checked)
    asked += f". Tried: {found['tried']}" if found["tried"] else ""
    spread = f" ± {number(found['deviation'])}" if len(seeds) > 1 else ""
    also = "; ".join(f"{name.removeprefix('eval/')} {number(value)}" for name, value in found["also"].items())
    cells = (
        found["title"] or record["name"],
        f"**{number(found['mean'])}**{spread}" + (f" ({also})" if also else ""),
        asked,
        found["published"],
        str(len(seeds)),
        f"{found['train_seconds'] / 60:.0f} min",
        record["revision"],
        f"`{command(record)}`",
    )
    return "| " + " | ".join(cells) + " |"


def command(record: Mapping[str, Any]) -> str:
    """What writes a record anew."""
    config, seeds = record["config"], record["figures"]["by_seed"]
    if "command" in config:
        return str(config["command"])
    file, _, variant = config["file"].rpartition("/")[2].partition(":")
    flags = [f"--config.{key}={value}" for key, value in config["overrides"].items()]
    changed = " ".join([*([f"--seeds {' '.join(seeds)}"] if [*seeds] != ["0"] else []), *flags])
    made = f"make reproduce-{file.removesuffix('.py')}" + (f" VARIANT={variant}" if variant else "")
    return made + (f" ARGS='{changed}'" if changed else "")


if __name__ == "__main__":
    cli.run(main)
