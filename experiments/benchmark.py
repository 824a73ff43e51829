"""Speed, stated as ratios measured side by side in one run on this machine.

`step`        one training step (forward, backward, clipping, AdamW) beside a PyTorch model of the same shape; needs the
              extra `parity`.
`families`    forward and backward of every family beside its reference class; needs `parity`.
`generate`    greedy decoding of a random GPT-2 of 124 M parameters beside `transformers`, and its import; `parity`.
`beam`        beam search with a small BART, 5 beams, beside `transformers`; `parity`.
`student`     an encoder of MiniLM's width and 3 layers beside one of 6: what distillation to half the layers buys.
`gpu`         GPT-2's 124 M on one GPU, 1,024 tokens a row, bfloat16, beside a compiled PyTorch model; `parity`. `not measured`
              without a GPU.
`allocator`   training steps whose process keeps its memory between them (`cli.FAST`) beside those of one that gives it back.
              `not measured` without glibc.
`products`    training steps whose products take bfloat16 (`model.matmul_dtype`) beside those that take float32.
`overhead`    the whole loop (logging, prefetch, checkpoints due) beside the bare compiled step, and the data wait.
`checkpoint`  how long a save of 124 M parameters with Adam's moments blocks the loop, asynchronous beside synchronous.
`memory`      bytes of the optimizer's state and of kept activations by the settings that change them; of shapes.
`startup`     seconds from start to the first step, with the compile cache cold and warm, the data being built.

Writes `benchmark-PART.json` for each part, with the revision that was measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import cli
from experiments.reproduce.record import RESULTS, write_result
from experiments.reproduce.step_worker import Worker, in_turns
from tfm_jax.errors import UserError, nearest

EXAMPLES = """\
  python -m experiments.benchmark
  python -m experiments.benchmark --only step --shapes A B --rounds 8
  python -m experiments.benchmark --only overhead checkpoint startup --json"""

# Layers, width, heads, length, batch, vocabulary.
SHAPES = {"A": (4, 128, 4, 64, 12, 65), "B": (6, 384, 6, 256, 8, 65), "C": (4, 512, 8, 256, 4, 50304)}
ROUNDS = {"A": 12, "B": 4, "C": 4}
STEPS_A_TURN = 5


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    parts: dict[str, Callable[[Any], dict[str, Any]]] = {
        "step": _steps, "families": _families, "generate": _generate, "beam": _beam, "student": _student, "gpu": _gpu,
        "allocator": _allocator, "products": _products, "overhead": _overhead, "checkpoint": _checkpoint, "memory": _memory,
        "startup": _startup,
    }  # fmt: skip
    made.add_argument("--only", nargs="+", default=list(parts), metavar="PART", help=f"of {', '.join(parts)}")
    made.add_argument("--families", action="store_const", dest="only", const=["families"], help="only that part")
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    made.add_argument("--rounds", type=int, help="turns of each side; by default enough for a steady median")
    made.add_argument("--workdir", type=Path, default=RESULTS, help="folder of benchmark-PART.json")
    flags, _ = cli.parse(made, argv)
    for name, known in (("only", parts), ("shapes", SHAPES)):
        for value in getattr(flags, name):
            if value not in known:
                raise UserError(f"--{name} {value}: does not exist.{nearest(value, known)}")
    cli.setup()
    figures: dict[str, Any] = {}
    for name in flags.only:
        found = parts[name](flags)
        config: dict[str, Any] = {"rounds": flags.rounds}
        if name in ("step", "allocator", "products"):
            config["rounds"] = {shape: flags.rounds or ROUNDS[shape] for shape in flags.shapes}
            config["shapes"] = {shape: SHAPES[shape] for shape in flags.shapes}
        write_result(f"benchmark-{name}", found, config=config, folder=flags.workdir)
        figures |= found
    if flags.json:
        cli.print_json(figures)
    return 0


# ---- step ----------------------------------------------------------------------------------------------------------


def _steps(flags: Any) -> dict[str, Any]:
    _need_torch()
    out: dict[str, Any] = {}
    rows = [("shape", "tfm_jax ms", "PyTorch ms", "speed ratio", "tokens/s")]
    for shape in flags.shapes:
        ours = Worker("experiments.benchmark:our_step", *SHAPES[shape])
        theirs = Worker("experiments.reproduce.torch_gpt:step", *SHAPES[shape])
        first, second = in_turns(ours, theirs, flags.rounds or ROUNDS[shape], STEPS_A_TURN)
        mine, other = statistics.median(first), statistics.median(second)
        ratio = _ratio(first, second)
        tokens = SHAPES[shape][3] * SHAPES[shape][4] / mine
        out[f"step/{shape}"] = {"tfm_jax_ms": 1e3 * mine, "pytorch_ms": 1e3 * other, "speed_ratio": ratio}
        times = (f"{1e3 * mine:.1f}", f"{1e3 * other:.1f}")
        rows.append((shape, *times, f"{ratio:.2f}", f"{tokens:,.0f}"))
    print(cli.table(rows))
    return out


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of theirs over ours, step by step: above 1 where ours is faster."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def _need_torch() -> None:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise UserError("This benchmark needs PyTorch: make benchmark installs it, or pip install 'tfm_jax[parity]'.")


def _families(flags: Any) -> dict[str, Any]:
    """Every family's forward and backward beside its reference class."""
    from experiments.reproduce.families import FAMILIES

    _need_torch()
    out: dict[str, Any] = {}
    rows = [("family", "class", "tfm_jax ms", "PyTorch ms", "speed ratio")]
    for name, shape in FAMILIES.items():
        sides = [Worker(f"experiments.reproduce.families:{side}", name) for side in ("ours", "theirs")]
        first, second = in_turns(sides[0], sides[1], flags.rounds or 4, STEPS_A_TURN)
        mine, other = statistics.median(first), statistics.median(second)
        ratio = _ratio(first, second)
        out[f"families/{name}"] = {"tfm_jax_ms": 1e3 * mine, "pytorch_ms": 1e3 * other, "speed_ratio": ratio}
        rows.append((name, shape.architecture, f"{1e3 * mine:.1f}", f"{1e3 * other:.1f}", f"{ratio:.2f}"))
    print(cli.table(rows))
    return out


def our_step(
    layers: int,
    width: int,
    heads: int,
    length: int,
    batch: int,
    vocab: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    matmul_dtype: Literal["float32", "bfloat16"] | None = None,
) -> Callable[[], float]:
    """A training step of the library, as `train` compiles it: a function that runs one and returns its loss."""
    import jax

    from tfm_jax.models.gpt import Model
    from tfm_jax.nn.spec import BlockSpec
    from tfm_jax.tasks import token_prediction
    from tfm_jax.train import optim
    from tfm_jax.train.state import initialiser
    from tfm_jax.train.step import make_train_step

    spec = BlockSpec(width=width, heads=heads, bias="none", activation="gelu", dtype=dtype, matmul_dtype=matmul_dtype)
    model = Model(block=spec, vocab_size=vocab, max_len=length, layers=layers)
    random = np.random.default_rng(0)
    tokens, targets = (random.integers(0, vocab, (batch, length), dtype=np.int32) for _ in range(2))
    data = jax.device_put(
        {"inputs": {"tokens": tokens}, "targets": targets, "weights": np.ones((batch, length), np.float32)}
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))["params"]
    optimizer = optim.make(shapes, steps=1000, schedule="constant", options={"b2": 0.99})
    task = token_prediction.make()
    state = jax.jit(initialiser(model, task, optimizer.tx, data["inputs"], 0))()
    step = jax.jit(make_train_step(task, model, optimizer.tx), donate_argnums=0).lower(state, data).compile()

    def run() -> float:
        nonlocal state
        state, metrics = step(state, data)
        return float(metrics["loss"][0])

    return run


# ---- generation ----------------------------------------------------------------------------------------------------


def _generate(flags: Any) -> dict[str, Any]:
    """100 tokens after a prompt of 16, batch 1 and 8; each side in its process, in turns."""
    _need_torch()
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.reproduce.gpt2", folder]
        record = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        out["generate/import_s"], out["generate/import_memory_over_weights"] = record["seconds"], record["memory"]
        print(f"importing it: {record['seconds']:.1f} s, at most {record['memory']:.2f} times the weights in memory")
        for batch in (1, 8):
            sides = [Worker(f"experiments.reproduce.gpt2:{side}", folder, batch) for side in ("ours", "theirs")]
            first, second = in_turns(sides[0], sides[1], flags.rounds or 3, 1)
            mine, other = (100 * batch / statistics.median(x) for x in (first, second))
            out[f"generate/batch_{batch}"] = {"tfm_jax": mine, "pytorch": other, "speed_ratio": mine / other}
            print(f"greedy, batch {batch}: {mine:.0f} tokens/s, PyTorch {other:.0f}: ratio {mine / other:.2f}")
    return out


def _beam(flags: Any) -> dict[str, Any]:
    """Sentences a second."""
    from experiments.reproduce.inference import BEAMS, LAYERS, NEW, ROWS, WIDTH

    _need_torch()
    sides = [Worker(f"experiments.reproduce.inference:{side}_beams") for side in ("our", "their")]
    first, second = in_turns(sides[0], sides[1], flags.rounds or 4, 2)
    mine, other = (ROWS / statistics.median(x) for x in (first, second))
    print(
        f"beam search, {LAYERS}+{LAYERS} layers of {WIDTH}, {ROWS} rows, {BEAMS} beams, {NEW} tokens:"
        f" {mine:.0f} sentences/s, PyTorch {other:.0f}: ratio {mine / other:.2f}"
    )
    return {"beam": {"tfm_jax": mine, "pytorch": other, "speed_ratio": mine / other}}


def _student(flags: Any) -> dict[str, Any]:
    """32 rows of 32 tokens, forward."""
    sides = [Worker("experiments.reproduce.inference:encoder", layers) for layers in (3, 6)]
    first, second = in_turns(sides[0], sides[1], flags.rounds or 4, STEPS_A_TURN)
    ratio = _ratio(first, second)
    fast, slow = (1e3 * statistics.median(x) for x in (first, second))
    print(f"a student of 3 layers: {fast:.1f} ms, its teacher of 6: {slow:.1f} ms: {ratio:.2f} times as fast")
    return {"student": {"student_ms": fast, "teacher_ms": slow, "speed_ratio": ratio}}


# ---- a GPU ---------------------------------------------------------------------------------------------------------

# As SHAPES; the vocabulary of 50,257 filled up to a multiple of 128, as llm.c has it too.
GPT2 = (12, 768, 12, 1024, 32, 50304)


def _gpu(flags: Any) -> dict[str, Any]:
    """Tokens a second and model FLOPs utilisation, attention not halved."""
    # Two frameworks share the card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from tfm_jax.models.gpt import Model
    from tfm_jax.nn.spec import BlockSpec
    from tfm_jax.parallel.devices import peak_flops

    if jax.default_backend() != "gpu":
        print("GPT-2 on a GPU: not measured, for there is none here.")
        return {"gpu": "not measured"}
    _need_torch()
    layers, width, heads, length, batch, vocab = GPT2
    model = Model(
        block=BlockSpec(width=width, heads=heads, bias="none"), vocab_size=vocab, max_len=length, layers=layers
    )
    ours = Worker("experiments.benchmark:our_step", *GPT2, "bfloat16")
    theirs = Worker("experiments.reproduce.torch_gpt:step", *GPT2, "cuda")
    first, second = in_turns(ours, theirs, flags.rounds or 8, 4 * STEPS_A_TURN)
    mine, other = (length * batch / statistics.median(x) for x in (first, second))
    peak, flops = peak_flops(), model.train_flops_per_token(length)
    mfu = [None if peak is None else speed * flops / peak for speed in (mine, other)]
    told = [
        f"{speed:,.0f} tokens/s" + ("" if u is None else f", MFU {u:.3f}")
        for speed, u in zip((mine, other), mfu, strict=True)
    ]
    kind = jax.devices()[0].device_kind
    print(f"GPT-2 124M on {kind}: {told[0]}; PyTorch, compiled: {told[1]}: ratio {mine / other:.2f}")
    return {"gpu": {"device": kind, "tokens_per_sec": mine, "mfu": mfu[0], "pytorch_tokens_per_sec": other,
                    "pytorch_mfu": mfu[1], "speed_ratio": mine / other}}  # fmt: skip


# ---- one setting beside another ------------------------------------------------------------------------------------


def _allocator(flags: Any) -> dict[str, Any]:
    """Two processes of the same step, in turns."""
    if platform.libc_ver()[0] != "glibc":
        print("the allocator: not measured, for it is glibc's that listens.")
        return {"allocator": "not measured"}

    def sides(shape: str) -> tuple[Worker, Worker]:
        kept, given = (
            Worker("experiments.benchmark:our_step", *SHAPES[shape], environment=cli.untold() | more)
            for more in ({"GLIBC_TUNABLES": cli.FAST}, {})
        )
        return kept, given

    return _by_shape(flags, "allocator", ("keeping", "giving_back"), sides)


def _products(flags: Any) -> dict[str, Any]:
    """Two processes of the same step, in turns."""

    def sides(shape: str) -> tuple[Worker, Worker]:
        narrow, wide = (
            Worker("experiments.benchmark:our_step", *SHAPES[shape], "float32", dtype)
            for dtype in ("bfloat16", "float32")
        )
        return narrow, wide

    return _by_shape(flags, "products", ("bfloat16", "float32"), sides)


def _by_shape(
    flags: Any, part: str, names: tuple[str, str], sides: Callable[[str], tuple[Worker, Worker]]
) -> dict[str, Any]:
    """How much faster the first of two sides is, for each shape."""
    out: dict[str, Any] = {}
    rows = [("shape", *(f"{name.replace('_', ' ')} ms" for name in names), "speed ratio")]
    for shape in flags.shapes:
        first, second = in_turns(*sides(shape), flags.rounds or ROUNDS[shape], STEPS_A_TURN)
        ratio = _ratio(first, second)
        times = [1e3 * statistics.median(x) for x in (first, second)]
        out[f"{part}/{shape}"] = {f"{n}_ms": t for n, t in zip(names, times, strict=True)} | {"speed_ratio": ratio}
        rows.append((shape, *(f"{x:.1f}" for x in times), f"{ratio:.2f}"))
    print(cli.table(rows))
    return out


# ---- the loop's overhead -------------------------------------------------------------------------------------------


def _overhead(flags: Any) -> dict[str, Any]:
    """The same number of steps, bare and in the loop, in alternating blocks."""
    from tfm_jax import config as configs
    from tfm_jax.train.build import build
    from tfm_jax.train.run import train

    steps, every = 300, 100
    ratios, waits = [], []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("".join(p.read_text(errors="replace") for p in sorted(Path("tfm_jax").rglob("*.py"))))
        overrides = {
            "data.source": f"text:{corpus}", "data.tokenizer": "bytes", "train.steps": str(steps),
            "checkpoint.every": str(every), "data.cache_dir": f"{folder}/cache", "log.every": "10",
        }  # fmt: skip
        config = configs.resolve(configs.load("configs/gpt_chars.py"), list(overrides.items()))
        for number in range(7):
            experiment = build(config)
            state = experiment.fresh_state()
            batch = experiment.batch(0)
            step = experiment.jitted_step().lower(state, batch).compile()
            state, metrics = step(state, batch)
            float(metrics["loss"][0])
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = step(state, batch)
            float(metrics["loss"][0])
            bare = time.perf_counter() - start
            # Evaluation is work that was asked for, and not overhead: the loop's clock stops for it. Checkpoints count.
            result = train(config, Path(folder) / f"run{number}").result
            lines = [json.loads(x) for x in (Path(folder) / f"run{number}" / "metrics.jsonl").read_text().splitlines()]
            blocked = sum(line.get("ckpt/blocking_s", 0.0) for line in lines if line["step"] < steps)
            ratios.append((result["train_seconds"] + blocked) / bare)
            waits += [line["perf/data_wait_frac"] for line in lines if "perf/data_wait_frac" in line][1:]
    out = {
        "overhead/loop_over_bare": statistics.median(ratios),
        "overhead/bare_step_ms": 1e3 * bare / steps,
        "overhead/data_wait_frac": statistics.median(waits),
    }
    print(
        f"loop over bare step: {out['overhead/loop_over_bare']:.3f} at {out['overhead/bare_step_ms']:.0f} ms a step,"
        f" {steps // every} checkpoints; data wait {100 * out['overhead/data_wait_frac']:.2f} %"
    )
    return out


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def _checkpoint(flags: Any) -> dict[str, Any]:
    """124 M random parameters with two moments each: random, because constant arrays compress to nothing."""
    import jax

    from tfm_jax.train.checkpoint import Checkpointer

    keys = iter(jax.random.split(jax.random.key(0), 64))
    shapes = {f"layer{i}": (768, 9216) for i in range(12)} | {"embedding": (50257, 768)}
    state = {
        part: {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
        for part in ("params", "mu", "nu")
    }
    count = sum(x.size for x in jax.tree.leaves(state["params"]))
    seconds: dict[str, list[float]] = {"asynchronous": [], "synchronous": []}
    with tempfile.TemporaryDirectory() as folder:
        writers = {
            kind: Checkpointer(Path(folder) / kind, keep=1, asynchronous=kind == "asynchronous") for kind in seconds
        }
        for step in range(1, 5):
            for kind, writer in writers.items():
                blocked = writer.save(step, state, {})
                writer.wait()
                if step > 1:  # the first save makes threads and folders
                    seconds[kind].append(blocked)
        for writer in writers.values():
            writer.close()
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    ratio = medians["asynchronous"] / medians["synchronous"]
    print(
        f"saving {count / 1e6:.0f} M parameters with moments blocks for {medians['asynchronous']:.2f} s asynchronous,"
        f" {medians['synchronous']:.2f} s synchronous: ratio {ratio:.3f}"
    )
    return {"checkpoint/blocking_ratio": ratio, **{f"checkpoint/{k}_s": v for k, v in medians.items()}}


# ---- memory --------------------------------------------------------------------------------------------------------


def _memory(flags: Any) -> dict[str, Any]:
    """GPT-2 of 124 M, bfloat16, layers scanned."""
    from experiments.reproduce import memory

    states, activations = memory.states(), memory.activations()
    rows = [("optimizer's state", "bytes a parameter", "on the host")]
    rows += [(name, f"{found['device']:.2f}", f"{found['host']:.2f}") for name, found in states.items()]
    print(cli.table(rows), end="\n\n")
    kept = [("model.remat", "bytes kept a token and layer")]
    print(cli.table(kept + [(name, f"{size:,.0f}") for name, size in activations.items()]))
    return {"memory/state": states, "memory/activations": activations}


# ---- start-up ------------------------------------------------------------------------------------------------------


def _startup(flags: Any) -> dict[str, Any]:
    """The main job, one step, from the command to the first loss line, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "experiments.train", "--config=configs/gpt_stdlib.py", "--config.log.every=1",
            f"--config.data.cache_dir={folder}/data", "--config.checkpoint.every=0",
        ]  # fmt: skip
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        _first_step([*command, f"--workdir={folder}/build"], environment)  # builds the data
        shutil.rmtree(f"{folder}/compiled")
        cold = _first_step([*command, f"--workdir={folder}/cold"], environment)
        warm = statistics.median(_first_step([*command, f"--workdir={folder}/warm{i}"], environment) for i in range(3))
    print(f"start to first step: {cold:.1f} s cold, {warm:.1f} s with the compile cache warm")
    return {"startup/cold_s": cold, "startup/warm_s": warm}


def _first_step(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise RuntimeError("The run ended before its first step:\n" + "".join(said))


if __name__ == "__main__":
    cli.run(main)
