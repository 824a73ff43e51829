"""A model, a task and a data set of somebody else's package, trained by dotted path without an edit here."""

import json
import shutil
import subprocess
import sys

import pytest

PACKAGE = {
    "nets.py": '''
import flax.linen as nn


class Tiny(nn.Module):
    """A plain linen module that returns only logits."""

    features: int
    classes: int = 5

    @nn.compact
    def __call__(self, x, *, train=False):
        return {"logits": nn.Dense(self.classes)(nn.relu(nn.Dense(self.features)(x)))}
''',
    "tasks.py": """
import jax.numpy as jnp
import optax

from tfm_jax.tasks.base import LossOut, Task


def classify(*, margin: float = 0.0) -> Task:
    def loss(apply, params, extra, batch, rng, train):
        logits = apply(params, **batch["inputs"], train=train)["logits"] - margin
        weights = batch["weights"]
        total = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]) * weights)
        hits = jnp.sum((jnp.argmax(logits, -1) == batch["targets"]) * weights)
        return LossOut(total, jnp.sum(weights), {"loss": (total, jnp.sum(weights)), "hits": (hits, jnp.sum(weights))}, {})

    return Task(loss=loss)
""",
    "points.py": """
import dataclasses

import numpy as np

from tfm_jax.data.types import Data


@dataclasses.dataclass(frozen=True)
class Points:
    batch_size: int
    size: int | None
    num_batches: int | None = None

    def batch_at(self, step, rows=slice(None)):
        index = step * self.batch_size + np.arange(self.batch_size)[rows]
        x = np.stack([np.sin(index * k) for k in range(1, 4)], 1).astype(np.float32)
        labels = (np.argmax(x, 1)).astype(np.int32)
        inside = np.ones(len(index)) if self.size is None else index < self.size
        return {"inputs": {"x": x}, "targets": labels, "weights": inside.astype(np.float32)}


def make(*, batch_size: int) -> Data:
    return Data(
        train=Points(batch_size, None),
        evals=lambda split, rows: Points(rows or batch_size, 20, -(-20 // (rows or batch_size))),
        vocab_size=None, tokenizer=None, facts={}, fingerprint="points-1",
    )
""",
}
CONFIG = """
def get_config():
    return {
        "model": {"name": "my_lab.nets:Tiny", "features": 16},
        "task": {"name": "my_lab.tasks:classify", "margin": 0.5},
        "data": {"name": "my_lab.points:make", "batch_size": 16},
        "optim": {"lr": 0.02, "warmup_steps": 5, "decay_pattern": "kernel$"},
        "train": {"steps": 60},
        "checkpoint": {"every": 30},
        "evals": {"held_out": {"split": "validation"}},
        "log": {"tensorboard": False},
    }
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my_lab").mkdir()
    (folder / "my_lab" / "__init__.py").write_text("")
    for name, text in PACKAGE.items():
        (folder / "my_lab" / name).write_text(text)
    (folder / "config.py").write_text(CONFIG)
    return folder


def command(package, command_env, name, *arguments):
    words = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
    # Started from the package's own folder, as its owner would.
    return subprocess.run(
        words, capture_output=True, text=True, timeout=150, cwd=package, env=command_env(path=package)
    )


@pytest.mark.journey
def test_train_go_on_and_evaluate(package, command_env, tmp_path):
    run = tmp_path / "run"
    done = command(package, command_env, "train", f"--config={package}/config.py", f"--workdir={run}", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["eval/held_out/tokens"] == 20 and result["eval/held_out/hits"] > 0.8
    assert result["parameters"] == 3 * 16 + 16 + 16 * 5 + 5
    model = json.loads((run / "config.json").read_text())["model"]
    assert model == {"name": "my_lab.nets:Tiny", "variant": None, "features": 16, "classes": 5}
    assert not (run / "tokenizer").exists()
    shutil.rmtree(run / "checkpoints" / "60")
    again = command(package, command_env, "train", f"--config={package}/config.py", f"--workdir={run}", "--json")
    assert again.returncode == 0 and "continued at step 30." in again.stderr, again.stderr
    key = "eval/held_out/loss"
    assert json.loads(again.stdout.splitlines()[-1])[key] == result[key]
    evaluated = command(package, command_env, "evaluate", f"--run={run}", "--json")
    assert json.loads(evaluated.stdout.splitlines()[-1])[key] == pytest.approx(result[key], rel=1e-6)
    generated = command(package, command_env, "generate", f"--run={run}")
    assert (generated.returncode, generated.stderr) == (
        2,
        f"error: {run} has no tokenizer: it was not trained on text.\n",
    )


def test_mistakes_name_its_classes(package, command_env):
    done = command(
        package, command_env, "train", f"--config={package}/config.py", "--config.model.feature=3", "--workdir=x"
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: --config.model.feature=3: unknown key 'model.feature'. Did you mean 'model.features'?\n",
    )
