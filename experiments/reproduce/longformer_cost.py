"""What Longformer costs as its input grows: seconds and compiled memory of forward and backward.

A linear cost doubles with the length; each doubling may cost at most 2.3 times. Writes `results/longformer_cost.json`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from experiments import cli
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError

EXAMPLES = "  python -m experiments.reproduce.longformer_cost"
LENGTHS = (2048, 4096, 8192)
MOST = 2.3
FIELDS = dict(layers=2, width=128, heads=4, window=256, max_global=16, vocab_size=256)


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--repeats", type=int, default=5, help="of which the fastest counts")
    flags, _ = cli.parse(made, argv)
    if flags.repeats < 1:
        raise UserError(f"--repeats={flags.repeats}: must be at least 1.")
    cli.setup()
    rows = [measure(length, flags.repeats) for length in LENGTHS]
    growth = {
        key: [after[key] / before[key] for before, after in itertools.pairwise(rows)]
        for key in ("seconds", "temp_bytes")
    }
    worst = max(max(ratios) for ratios in growth.values())
    figures = {"lengths": rows, "growth": growth, "worst": worst, "limit": MOST}
    write_result("longformer_cost", figures, config=FIELDS)
    for row in rows:
        print(f"{row['length']:6d} tokens: {row['seconds']:.3f} s, {row['temp_bytes'] / 2**20:.0f} MiB")
    print(f"growth for twice the length: at most {worst:.2f} times (limit {MOST})")
    if flags.json:
        cli.print_json(figures)
    return int(worst > MOST)


def measure(length: int, repeats: int) -> dict[str, Any]:
    """Seconds and temporary bytes of the gradient of a masked-token loss on one row, its first token global."""
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
    jax.block_until_ready(step(params, batch))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(step(params, batch))
        seconds.append(time.perf_counter() - began)
    memory: Any = step.memory_analysis()
    return {"length": length, "seconds": min(seconds), "temp_bytes": int(memory.temp_size_in_bytes)}


if __name__ == "__main__":
    cli.run(main)
