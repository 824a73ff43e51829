"""A search over meshes: what it tries, what it leaves out, and that what it finds can be trained."""

import dataclasses
import json
import math

import jax
import pytest

from experiments import plan as command
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.parallel import mesh
from tfm_jax.parallel import search as searching
from tfm_jax.parallel.chips import Chip
from tfm_jax.parallel.plan import Plan, Topology, drawn
from tfm_jax.train.build import build


@pytest.fixture(scope="module")
def slow():
    """Devices that are here, as if they were chips of a pod."""
    return Topology("8 cores", jax.devices(), Chip("core", 1e9, 2**30, 1e10, 1e9, 1e8))


@pytest.fixture(scope="module")
def config(make_config):
    return drawn(make_config({"model.layers": 4, "model.layer_loop": "scan", "model.heads": 2, "data.batch_size": 16}))


@pytest.fixture(scope="module")
def bounds(config, slow):
    return list(searching.bounds(config, slow))


def test_all_that_divide_are_tried(bounds):
    """8 devices over data, fsdp and 2 heads; 16 rows over the first two and 1, 2, 4 or 8 microbatches; three ways to keep."""
    tried = {tuple(bound.changes.values()) for bound in bounds}
    want = {
        (data, fsdp, 8 // data // fsdp, 1, accum, remat)
        for data in (1, 2, 4, 8)
        for fsdp in (1, 2, 4, 8)
        for accum in (1, 2, 4, 8)
        for remat in ("none", "dots", "full")
        if 8 // data // fsdp in (1, 2) and data * fsdp in (4, 8) and 16 % (accum * data * fsdp) == 0
    }
    assert len(tried) == len(bounds) and tried == want


def bound(bounds, **want):
    keys = {
        "data": "mesh.data",
        "fsdp": "mesh.fsdp",
        "tensor": "mesh.tensor",
        "accum": "train.accum",
        "remat": "model.remat",
    }
    return next(b for b in bounds if all(b.changes[keys[name]] == value for name, value in want.items()))


def test_what_choices_need(bounds, config, slow):
    """The state split 8 ways is an eighth; a row kept by `full` is the blocks' inputs; computing again costs time."""
    state = build(config, devices=slow.devices).abstract_state()
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    copied, split = (bound(bounds, data=d, fsdp=f, accum=1, remat="none") for d, f in ((8, 1), (1, 8)))
    params = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state.params))
    assert copied.memory - split.memory == pytest.approx((whole + params) * 7 / 8, rel=0.1)
    none, full = (bound(bounds, data=8, accum=1, remat=remat) for remat in ("none", "full"))
    assert none.seconds < full.seconds and none.memory > full.memory
    deep = [configs.changed(config, {"model.remat": "full", "model.layers": n}) for n in (2, 4)]
    kept = [searching._kept(build(one, devices=slow.devices[:1])) for one in deep]
    assert kept[1] - kept[0] == 2 * 8 * 16 * 4  # layers, length, width, float32
    assert bound(bounds, data=8, accum=2, remat="none").memory < none.memory
    # All but its own eighth comes twice and goes once, in bfloat16; the norms are whole everywhere.
    assert split.sent == pytest.approx(3 * 7 * params / 8 / 2 / 1e9, rel=0.1)


def test_the_fastest_that_fits_wins(config, slow, bounds, monkeypatch):
    """With a compiler that says what the bound says, but that one choice needs more than there is."""
    seen = []

    def compiled(config, where):
        experiment = build(config, devices=where.devices)
        sizes, accum, remat = experiment.layout.mesh.shape, config["train"]["accum"], config["model"]["remat"]
        seen.append((sizes["data"], sizes["fsdp"], sizes["tensor"], accum, remat))
        fits = len(seen) != 2
        took = 10.0 if len(seen) == 1 else 3.0 - len(seen) / 10
        plan = Plan("8 cores", 8, 1, 1, 1.0, 1.0, 1.0, fits, 1.0, 1.0, 1.0, 1.0, 1.0, [], took, 0.5, "compute", 1.0, 0)
        return experiment, plan

    monkeypatch.setattr(searching, "bounds", lambda config, where: iter(bounds))
    monkeypatch.setattr(searching, "planned", compiled)
    found, experiment, plan, tried = searching.search(config, slow, compiled=3)
    assert len(seen) == 4 and len(set(seen)) == 4 and seen[0] == (8, 1, 1, 1, "none")
    sizes = experiment.layout.mesh.shape
    assert (sizes["data"], sizes["fsdp"], sizes["tensor"], found["train"]["accum"], found["model"]["remat"]) == seen[3]
    assert plan.step == pytest.approx(2.6) and [one.fits for _, one in tried] == [True, False, True, True]
    seen.clear()
    small = Topology("8 cores", slow.devices, Chip("core", 1e11, 100.0, 1e10, 1e9, 1e8))
    fits_not = dataclasses.replace(plan, fits=False)
    monkeypatch.setattr(searching, "planned", lambda config, where: (experiment, fits_not))
    with pytest.raises(
        UserError, match=r"^Nothing fits on 8 cores: the least is 0\.0 GiB a chip, of 0\. Use more chips"
    ):
        searching.search(config, small, compiled=1)


@pytest.mark.journey
def test_from_the_command_to_a_config(config_file, slow, tmp_path, monkeypatch, capsys):
    """The written file is the old one with what was found, and plans as well."""
    monkeypatch.setattr("tfm_jax.parallel.plan.topology", lambda name: slow)
    path = tmp_path / "found.py"
    flags = [f"--config={config_file}", "--topology=cpu:8", "--search=1", f"--write={path}", "--measure=1", "--json"]
    assert command.main([*flags, "--config.optim.lr=0.5"]) == 0
    out = capsys.readouterr().out
    assert "choices" in out and "Measured: " in out and "step_seconds" in out
    found = configs.resolve(configs.load(str(path)))
    assert found["optim"]["lr"] == 0.5 and math.prod(mesh.make(**found["mesh"]).mesh.shape.values()) == 8
    told = json.loads(out.splitlines()[-1])
    assert told["prediction_error"] == pytest.approx(told["step_seconds"] / told["measured_step_seconds"] - 1)


def test_bad_input():
    with says("--write=a.py: there is nothing to write without --search."):
        command.main(["--config=configs/gpt_stdlib.py", "--topology=v5p:4x4x4", "--write=a.py"])
    with says("--measure: v5p:4x4x4 is not here. Devices that are: cpu:N, gpu:N."):
        command.main(["--config=configs/gpt_stdlib.py", "--topology=v5p:4x4x4", "--measure"])
    with says("--topology=cpu:64: devices of this kind here: 8. JAX_NUM_CPU_DEVICES=64 simulates as many."):
        command.main(["--config=configs/gpt_stdlib.py", "--topology=cpu:64"])
    with pytest.raises(UserError, match=r"^--topology=gpu:1: there is no gpu here"):
        command.main(["--config=configs/gpt_stdlib.py", "--topology=gpu:1"])
