"""Every config in `configs/`: its smoke form trains, alike on every mesh and in both layer loops; and a golden table.

`python -m tests.test_configs` writes the table anew.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.parallel import mesh
from tfm_jax.parallel.sharding import Layout
from tfm_jax.sections import build_model, family
from tfm_jax.train.build import build

FOLDER = Path(__file__).resolve().parents[1] / "configs"
GOLDEN = Path(__file__).parent / "configs.txt"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
# These train on files that the user names; the tests of recipes, generation and questions give them some.
_OWN_FILES = (
    "bert_books", "distil_sst2", "embed_stsb", "glue_mixture", "gpt_chars", "lm_wikitext2", "minilm_sst2", "mt_multi30k", "qa_policyqa",
    "scitldr", "small_bert", "t5_books",
)  # fmt: skip
SMOKE = [name for name in NAMES if name not in _OWN_FILES]


def losses(name, sizes, steps=2):
    """Training losses of the first steps of the smoke form, on a mesh of these sizes."""
    experiment = build(configs.resolve(configs.load(f"{FOLDER}/{name}.py:smoke")))
    layout = mesh.make(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    experiment = dataclasses.replace(experiment, layout=layout.with_rules(experiment.layout.rules))
    with jax.set_mesh(layout.mesh):
        state, step, out = experiment.fresh_state(), experiment.jitted_step(), []
        for i in range(steps):
            state, metrics = step(state, experiment.batch(i))
            total, weight = metrics["loss"]
            out.append(float(total) / float(weight))
    return out


# For `make test`, `tests/parallel/test_meshes_equal.py` has small ones.
@pytest.mark.journey
@pytest.mark.parametrize("name", SMOKE)
def test_smoke_trains_the_same_on_every_mesh(name):
    one = losses(name, {"data": 1})
    assert np.all(np.isfinite(one)) and one[0] != one[1]
    np.testing.assert_allclose(losses(name, {"data": 2, "fsdp": 2, "tensor": 2}), one, rtol=1e-5)


def line(name):
    """Name, parameter count, and a hash of every parameter's path, shape and place on a mesh of 2x2x2."""
    section = configs.resolve(
        configs.load(f"{FOLDER}/{name}.py"), [("data.source", "stdlib")] if name == "gpt_chars" else []
    )
    model = build_model({k: _filled(k, v) for k, v in section["model"].items()})
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]
    layout = Layout(mesh.make(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8]).mesh)
    rows = layout.with_rules(family(section["model"]["name"], "RULES", ())).table(params)
    text = json.dumps(sorted((row.path, row.shape, str(row.spec)) for row in rows))
    count = sum(x.size for x in jax.tree.leaves(params))
    return f"{name:24}{count:>12,}  {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _filled(key, value):
    """What the data would fill in."""
    return {"vocab_size": 4096, "classes": 10}[key] if value is None and key in ("vocab_size", "classes") else value


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_table(name):
    """A changed line is a parameter renamed, reshaped or moved: say so in the commit, older checkpoints will not fit."""
    lines = {text.split()[0]: text for text in GOLDEN.read_text().splitlines()}
    assert lines.get(name) == line(name), "python -m tests.test_configs writes the table anew"


def test_a_decoder_begins_with_an_id_of_the_models(corpus):
    for start in (-1, 99_999):
        changes = [("data.source", f"text:{corpus}/*.txt"), ("data.decoder_start", str(start))]
        with pytest.raises(
            UserError, match=rf"^data\.decoder_start={start}: the model's ids are 0 to \d+ \(model\.vocab_size=\d+\)\.$"
        ):
            build(configs.resolve(configs.load(f"{FOLDER}/t5_stdlib.py:smoke"), changes))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDEN.write_text("".join(f"{line(name)}\n" for name in NAMES))
