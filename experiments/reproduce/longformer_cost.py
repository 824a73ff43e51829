"""What Longformer costs as its input grows: seconds and compiled memory of forward and backward.

A linear cost doubles with the length; each doubling may cost at most 2.3 times, in memory and in time. On CPU that is
the time of this process's cores, which other programs do not stretch; the wall's is recorded too. Writes
`results/longformer_cost.json`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import cli
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError

EXAMPLES = "  python -m experiments.reproduce.longformer_cost"
LENGTHS = (2048, 4096, 8192)
MOST = 2.3
FIELDS = dict(layers=2, width=128, heads=4, window=256, max_global=16, vocab_size=256)


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--repeats", type=int, default=10, help="of which the fastest counts")
    flags, _ = cli.parse(made, argv)
    if flags.repeats < 1:
        raise UserError(f"--repeats={flags.repeats}: must be at least 1.")
    cli.setup()
    steps = [compiled(length) for length in LENGTHS]
    # In turns, so that another program's burst of work is not one length's alone.
    rounds = [[timed(step) for step in steps] for _ in range(flags.repeats)]
    rows = []
    for length, step, times in zip(LENGTHS, steps, zip(*rounds, strict=True), strict=True):
        wall, cores = (min(column) for column in zip(*times, strict=True))
        rows.append({"length": length, "wall_seconds": wall, "core_seconds": cores, "temp_bytes": step.temp_bytes})
    judged = ("core_seconds" if on_cpu() else "wall_seconds", "temp_bytes")
    growth = {key: [after[key] / before[key] for before, after in itertools.pairwise(rows)] for key in judged}
    worst = max(max(ratios) for ratios in growth.values())
    figures = {"lengths": rows, "growth": growth, "worst": worst, "limit": MOST}
    write_result("longformer_cost", figures, config=FIELDS)
    for row in rows:
        spent = f"{row['wall_seconds']:.3f} s, {row['core_seconds']:.3f} core seconds"
        print(f"{row['length']:6d} tokens: {spent}, {row['temp_bytes'] / 2**20:.0f} MiB")
    print(f"growth for twice the length: at most {worst:.2f} times (limit {MOST})")
    if flags.json:
        cli.print_json(figures)
    return int(worst > MOST)


class Step(NamedTuple):
    run: Callable[[], Any]
    temp_bytes: int


def timed(step: Step) -> tuple[float, float]:
    """Seconds of the wall's clock, and of this process's cores."""
    wall, cores = time.perf_counter(), time.process_time()
    step.run()
    return time.perf_counter() - wall, time.process_time() - cores


def on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def compiled(length: int) -> Step:
    """The gradient of a masked-token loss on one row, its first token global, which has run once."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tfm_jax.sections import build_model, section_fields
    from tfm_jax.tasks import token_prediction
    from tfm_jax.tasks.base import bind

    defaults = {name: field.default for name, field in section_fields("model", {"name": "longformer"}).items()}
    model = build_model(defaults | {"name": "longformer", "max_len": length} | FIELDS)
    params = jax.jit(lambda: model.init(jax.random.key(0), **model.example())["params"])()
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, FIELDS["vocab_size"], (1, length)), jnp.int32)
    batch = {
        "inputs": {"tokens": tokens, "global_tokens": jnp.arange(length)[None] == 0},
        "targets": tokens,
        "weights": jnp.asarray(draw.random((1, length)) < 0.15, jnp.float32),
    }
    task = token_prediction.make()

    def total(params: Any, batch: Any) -> jax.Array:
        return task.loss(bind(model, {}), params, {}, batch, None, True).total

    step = jax.jit(jax.grad(total)).lower(params, batch).compile()
    memory: Any = step.memory_analysis()

    def run() -> Any:
        return jax.block_until_ready(step(params, batch))

    run()
    return Step(run, int(memory.temp_size_in_bytes))


if __name__ == "__main__":
    cli.run(main)
