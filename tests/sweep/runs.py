"""Run directories as a sweep leaves them, written by hand."""

import itertools
import json

import numpy as np

from tfm_jax.files import write_status


def write_sweep(folder, rates=8, seeds=2):
    """`rates` x `seeds` runs; the loss is best at the third rate, and differs by a hundredth between seeds."""
    for i, seed in itertools.product(range(rates), range(seeds)):
        rate = 1e-3 * 2**i
        run = folder / f"lr={rate:.6g},seed={seed}"
        run.mkdir(parents=True)
        config = {"model": {"name": "gpt", "width": 64}, "optim": {"lr": rate}, "log": {"every": 1 + seed}}
        config |= {"train": {"seed": seed, "steps": 40}, "data": {"seed": seed, "cache_dir": f"/somewhere/{i}"}}
        (run / "config.json").write_text(json.dumps(config))
        final = 2 + 0.1 * (i - 2) ** 2 + 0.01 * seed
        lines = []
        for step in range(1, 41):
            noise = np.sin(step * (i + 1)) / 20
            line = {"step": step, "train/loss": final + 3 * np.exp(-step / 9) + noise, "train/grad_norm": 1 / step}
            lines.append(line | {"optim/lr": rate * min(1, step / 4), "perf/tokens_per_sec": 1e4 + 10 * step})
            if step % 10 == 0:
                lines.append({"step": step, "eval/validation/loss": final + 2 * np.exp(-step / 9)})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "result.json").write_text(json.dumps({"step": 40, "parameters": 1000, "train_seconds": 3.5}))
        write_status(run, "finished")
    return folder
