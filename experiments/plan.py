"""Know a training step's memory, time and traffic on a TPU pod before renting it: no data, no devices.

The step is compiled for the topology by the real TPU compiler (extra `tpu`), and what it says is set against the chips' data
sheets. Memory is the compiler's own figure; times are a roofline.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic
from tfm_jax.units import counted, short

EXAMPLES = """\
  python -m experiments.plan --config=configs/gpt_stdlib.py --topology=v5e:2x4 --config.mesh.fsdp=8 --config.mesh.data=1
  python -m experiments.plan --config=configs/llama_7b.py --topology=v5p:4x4x4 --tokens=1e12
  python -m experiments.plan --config=configs/llama_7b.py --topology=2xv5e:16x16 --config.mesh.data=2
  python -m experiments.plan --config=configs/llama_7b.py --topology=v6e:16x16 --search --write=llama_v6e.py
  python -m experiments.plan --config=configs/gpt_stdlib.py --topology=cpu:1 --measure
  JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m experiments.plan --config=configs/pod.py:smoke --topology=cpu:8 --search"""


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument(
        "--config", required=True, metavar="FILE[:ARGS]", help="config file; --config.KEY=VALUE changes a key"
    )
    made.add_argument(
        "--topology",
        required=True,
        help="CHIP:SHAPE, v5p:4x4x4; 2xv5e:16x16 for two slices; cpu:8 or gpu:8: devices that are here",
    )
    made.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=4,
        default=0,
        metavar="N",
        help="try other sizes of data, fsdp, tensor and expert, train.accum and model.remat, compile the N best (4), and plan the fastest",
    )
    made.add_argument("--write", type=Path, metavar="FILE.py", help="with --search: the fastest as a config of its own")
    made.add_argument(
        "--measure",
        type=int,
        nargs="?",
        const=5,
        default=0,
        metavar="STEPS",
        help="on cpu and gpu: also run so many steps (5), and say how wrong the prediction is",
    )
    made.add_argument("--tokens", type=float, default=1e12, help="of a whole training, for its time and chip-hours")
    made.add_argument("--table", action="store_true", help="show where every array of the state goes")
    made.add_argument("--picture", type=Path, help="write a picture of where the time goes, .png or .svg")
    flags, overrides = cli.parse(made, argv)
    if flags.tokens <= 0:
        raise UserError(f"--tokens={flags.tokens}: must be above 0.")
    if flags.write is not None and not flags.search:
        raise UserError(f"--write={flags.write}: there is nothing to write without --search.")
    kind = flags.topology.partition(":")[0]
    if flags.measure and kind not in ("cpu", "gpu"):
        raise UserError(f"--measure: {flags.topology} is not here. Devices that are: cpu:N, gpu:N.")
    import jax

    if kind != "gpu":
        # The devices are not here, and looking for them takes minutes.
        jax.config.update("jax_platforms", "cpu")
    config = configs.resolve(configs.load(flags.config), overrides)
    cli.setup()
    # A program for devices that are not here cannot be read back, and how long the compiler takes is a figure.
    jax.config.update("jax_enable_compilation_cache", False)
    from tfm_jax.parallel.plan import measured, planned, topology
    from tfm_jax.parallel.search import search
    from tfm_jax.parallel.sharding import format_table

    where = topology(flags.topology)
    if flags.search:
        found, experiment, plan, tried = search(config, where, compiled=flags.search, say=print)
        if flags.write is not None:
            chosen = {name: found[name] for name in ("mesh", "train", "model")}
            chosen["train"] = {**chosen["train"], "stop_metric": config["train"]["stop_metric"]}
            _write(flags.write, flags.config, {**config, **chosen}, flags.topology)
    else:
        (experiment, plan), tried = planned(config, where), []
    if flags.table:
        print(format_table(plan.table), end="\n\n")
    print(_report(plan, where.chip, flags.tokens))
    if flags.picture is not None:
        _picture(plan, flags.picture)
    found_figures = figures(plan, flags.tokens)
    if flags.search:
        found_figures["tried"] = [{"changes": changes, **figures(one, flags.tokens)} for changes, one in tried]
    if flags.measure:
        took = measured(experiment, flags.measure)
        found_figures |= {"measured_step_seconds": took, "prediction_error": plan.step / took - 1}
        off = 100 * (plan.step / took - 1)
        print(f"Measured: {1e3 * took:.1f} ms; the prediction is {abs(off):.0f} % {'below' if off < 0 else 'above'}.")
    if flags.json:
        cli.print_json(found_figures)
    return 0 if plan.fits else 1


def _write(path: Path, base: str, config: configs.Config, topology: str) -> None:
    """A config file that is another one with what a search and the command line have changed."""
    before, after = configs.flat(configs.resolve(configs.load(base))), configs.flat(config)
    changes: dict[str, Any] = {}
    for key, value in after.items():
        if before.get(key) != value:
            *sections, last = key.split(".")
            functools.reduce(lambda at, name: at.setdefault(name, {}), sections, changes)[last] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'''"""`{base}` as `plan --search` found it fastest on {topology}."""

from tfm_jax import config as configs


def get_config(arguments=""):
    config = configs.load("{base}")
    config.update({changes!r})
    return config
'''
    write_atomic(path, text.encode())
    print(f"{path} is {base} with {', '.join(f'{key}={value}' for key, value in configs.flat(changes).items())}.")


def figures(plan: Any, tokens: float) -> dict[str, Any]:
    """What a plan says, in plain numbers."""
    # JSON has no infinity, which a step that does not fit takes.
    step = plan.step if math.isfinite(plan.step) else None
    days = None if step is None else tokens / plan.tokens * step / 86400
    return {
        "topology": plan.topology,
        "chips": plan.chips,
        "params": plan.params,
        "tokens_per_step": plan.tokens,
        "hbm_gib_per_chip": plan.hbm / 2**30,
        "arguments_gib_per_chip": plan.arguments / 2**30 if plan.fits else None,
        "temporaries_gib_per_chip": plan.temporaries / 2**30 if plan.fits else None,
        "fits": plan.fits,
        "step_seconds": step,
        "mfu": plan.mfu,
        "mfu_causal_halved": plan.halved_mfu,
        "bottleneck": plan.bottleneck,
        "compute_seconds": plan.compute,
        "memory_seconds": plan.memory,
        "model_flops": plan.model_flops,
        "model_flops_causal_halved": plan.causal_flops,
        "hardware_flops": plan.hardware_flops,
        "traffic": [
            {"kind": one.kind, "axes": one.axes, "network": one.network, "gib_per_chip": one.bytes_per_chip / 2**30, "seconds": one.seconds,
             "exposed_seconds": one.exposed}
            for one in plan.traffic
        ],
        "training_days": days,
        "chip_hours": None if days is None else 24 * days * plan.chips,
        "compile_seconds": plan.compile_seconds,
    }  # fmt: skip


def _report(plan: Any, chip: Any, tokens: float) -> str:
    room = chip.hbm / 2**30
    lines = [
        f"{short(plan.params)} parameters, {plan.tokens:,} tokens a step, {counted(plan.chips, 'chip')} of {chip.name}"
        f" ({plan.topology}), compiled in {plan.compile_seconds:.0f} s.",
        f"Memory: {plan.hbm / 2**30:.3g} of {room:.3g} GiB a chip: {'fits' if plan.fits else 'DOES NOT FIT'}.",
    ]
    if plan.fits:
        lines[-1] += f" Arguments {plan.arguments / 2**30:.3g}, temporaries {plan.temporaries / 2**30:.3g} GiB."
    gave_way = [row for row in plan.table if row.note]
    lines += [
        f"  {row.path} {'x'.join(map(str, row.shape))}: {row.note} ({row.bytes_per_device / 2**20:.1f} MiB a chip)"
        for row in gave_way[:8]
    ]
    lines += [f"  ... and {len(gave_way) - 8} more (--table)"] if len(gave_way) > 8 else []
    if plan.step == float("inf"):
        return "\n".join(lines)
    rows = [("what", "GiB a chip", "ms", "exposed ms")]
    rows.append(("products", "", f"{1e3 * plan.compute:.1f}", ""))
    rows.append(("memory", "", f"{1e3 * plan.memory:.1f}", ""))
    for one in plan.traffic:
        rows.append(
            (
                f"{one.kind}, {one.links}",
                f"{one.bytes_per_chip / 2**30:.2f}",
                f"{1e3 * one.seconds:.1f}",
                f"{1e3 * one.exposed:.1f}",
            )
        )
    again = plan.hardware_flops / plan.model_flops
    days = tokens / plan.tokens * plan.step / 86400
    lines += [
        cli.table(rows),
        f"FLOPs a step: the model's {plan.model_flops:.3g} ({plan.causal_flops:.3g} with causal attention halved), computed"
        f" {plan.hardware_flops:.3g}, {again:.2f} times as many.",
        f"Step: {1e3 * plan.step:.1f} ms; MFU {100 * plan.mfu:.1f} % ({100 * plan.halved_mfu:.1f} % with causal attention halved);"
        f" bottleneck: {plan.bottleneck}.",
        f"{tokens:.3g} tokens: {days:.1f} days, {24 * days * plan.chips:,.0f} chip-hours.",
    ]
    if plan.endless_loops:
        lines.append(f"{plan.endless_loops} loops do not say how often they run, and count once.")
    return "\n".join(lines)


def _picture(plan: Any, path: Path) -> None:
    """Bars of what a step's time is made of, if each had it for itself, and the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, values, shown = ["products", "memory"], [plan.compute, plan.memory], [0.0, 0.0]
    for one in plan.traffic:
        names.append(f"{one.kind}, {one.links}")
        values.append(one.seconds)
        shown.append(one.exposed)
    figure = Figure(figsize=(7, 0.45 * len(names) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(names, [1e3 * x for x in values], color="#4477aa", label="alone")
    axes.barh(names, [1e3 * x for x in shown], color="#ee6677", label="exposed")
    axes.axvline(1e3 * plan.step, color="black", linewidth=1, label="step")
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.set_title(
        f"{plan.topology}: {1e3 * plan.step:.0f} ms, MFU {100 * plan.mfu:.0f} %, {plan.hbm / 2**30:.3g} GiB",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main)
