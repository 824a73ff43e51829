"""Look at runs: one HTML page (and PNGs) for a run or all runs below some folders, or a live table in the terminal.

Curves, the settings that differ and what came of them, and for one of the runs samples and attention maps. The page needs no
network. In it what is selected in one figure or in the table is selected in all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax.errors import UserError, nearest
from tfm_jax.metrics import direction
from tfm_jax.units import counted

EXAMPLES = """\
  python -m experiments.report runs/gpt_stdlib --prompt 'def main(' --attend 'for i in range(10):'
  python -m experiments.report runs/sweep --metric eval/validation/loss
  python -m experiments.report runs/sweep/a runs/sweep/b --to compared
  python -m experiments.report runs/sweep --watch"""

# Between looks of --watch.
EVERY_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run, or a folder with runs below it")
    made.add_argument("--to", type=Path, help="folder of the page; DIR/report where there is one DIR")
    made.add_argument("--metric", help="what runs are compared by; by default a study's own, or an evaluator's loss")
    made.add_argument(
        "--goal",
        choices=("lower", "higher"),
        help="which is better; by default as the study has it, or by the metric's name",
    )
    made.add_argument("--run", help="name of the run of samples and attention maps; the best one by default")
    made.add_argument("--prompt", action="append", default=[], help="sample what it says to this; may be repeated")
    made.add_argument("--attend", action="append", default=[], help="draw its attention on this text; may be repeated")
    made.add_argument("--heads", nargs="+", default=[], metavar="LAYER.HEAD", help="whose attention; the first 12")
    made.add_argument(
        "--watch",
        action="store_true",
        help="a live table in the terminal, or through a pipe one at each change, until Ctrl-C",
    )
    made.add_argument("--every", type=float, help=f"seconds between looks of --watch ({EVERY_S:g})")
    flags, _ = cli.parse(made, argv)
    if flags.watch:
        if flags.to is not None or flags.run is not None or flags.prompt or flags.attend or flags.heads or flags.json:
            raise UserError("--watch writes no page: it goes with --metric, --goal and --every alone.")
        from tfm_jax.sweep.watch import watch

        watch(flags.folders, flags.metric, flags.goal, EVERY_S if flags.every is None else flags.every)
        return 0
    if flags.every is not None:
        raise UserError(f"--every={flags.every:g} is for --watch: give both.")
    if flags.heads and not flags.attend:
        raise UserError(f"--heads {' '.join(flags.heads)} look at a text: give it with --attend TEXT.")
    if flags.run is not None and not (flags.prompt or flags.attend):
        raise UserError(f"--run={flags.run} is the one of samples and attention: give --prompt TEXT or --attend TEXT.")
    if flags.to is None and len(flags.folders) > 1:
        raise UserError("--to is not set: where should the page of several folders go? For instance --to=compared")
    began = time.perf_counter()
    from tfm_jax.files import write_atomic
    from tfm_jax.sweep import results
    from tfm_jax.sweep.content import Report
    from tfm_jax.sweep.importance import importances
    from tfm_jax.sweep.page import page
    from tfm_jax.sweep.pictures import draw

    runs = results.read_all(flags.folders)
    judged = results.judged(runs, flags.metric, flags.goal)
    metric = results.deciding(runs, judged.metric)
    goal = judged.goal or direction(metric)
    keys, names = results.differing(runs), [run.name for run in runs]
    if flags.run is not None and flags.run not in names:
        raise UserError(f"--run={flags.run} is none of them.{nearest(flags.run, names)}")
    best = results.ranked(runs, metric, goal)[0]
    chosen = best if flags.run is None else runs[names.index(flags.run)]
    samples, maps = _looked_into(chosen.path, flags) if flags.prompt or flags.attend else ([], [])
    title = (flags.folders[0] if len(flags.folders) == 1 else flags.to).resolve().name
    report = Report(title, runs, keys, metric, goal, importances(runs, keys, metric), chosen.name, samples, maps)
    folder = flags.to or flags.folders[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "index.html", page(report))
    pictures = draw(report, folder)
    for run in runs:
        if run.state == "damaged":
            print(f"{run.name} is damaged: {run.reason}")
    size = (folder / "index.html").stat().st_size
    seconds = time.perf_counter() - began
    print(f"{folder / 'index.html'}  {counted(len(runs), 'run')}, {size / 1e6:.1f} MB, {seconds:.1f} s")
    if flags.json:
        found = {"page": str(folder / "index.html"), "pictures": [str(path) for path in pictures], "runs": len(runs)}
        cli.print_json({**found, "best": best.name, metric: best.value(metric), "bytes": size, "seconds": seconds})
    return 0


def _looked_into(run: Path, flags: Any) -> tuple[list[tuple[str, str]], list[Any]]:
    """What a run says to each prompt, and what it looks at in each text."""
    from experiments.generate import Loaded
    from tfm_jax.decode.attention import attention_weights, chosen
    from tfm_jax.decode.sample import Sampling
    from tfm_jax.sweep.content import Map

    cli.setup()
    model = Loaded(run)
    samples, maps = [], []
    for prompt in flags.prompt:
        if model.answers:
            text, _ = model.likeliest(prompt, 4, 1.0, None)
        else:
            text = prompt + model.drawn(prompt, Sampling(0.8, 40), None, 0)[0]
        samples.append((prompt, text))
    for text in flags.attend:
        inputs, tokens = model.attended(text)
        for title, weights in chosen(attention_weights(model.model, model.params, inputs), flags.heads):
            maps.append(Map(title, weights, *_sides(title, tokens)))
    return samples, maps


def _sides(title: str, tokens: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """The tokens that look and that are seen, by where the layer stands: in an encoder, a decoder, or between them."""
    if "decoder_tokens" not in tokens:
        return tokens["tokens"], tokens["tokens"]
    looking = tokens["decoder_tokens"] if "decoder/" in title else tokens["tokens"]
    return looking, tokens["tokens"] if "cross" in title else looking


if __name__ == "__main__":
    cli.run(main)
