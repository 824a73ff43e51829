"""Checkpoints: whole or set aside, the state at the save, and the order in which a run starts."""

import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.train.checkpoint import CHECKSUMS, Checkpointer, CorruptCheckpoint, Restored, first_state


def state(value, size=1000):
    return {"params": {"kernel": jnp.full((size,), value, jnp.float32)}, "step": jnp.int32(value), "empty": {}}


ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    state(0),
)


@pytest.fixture
def filled(tmp_path):
    """Checkpoints of steps 2, 4 and 6."""
    made = Checkpointer(tmp_path / "checkpoints")
    for step in (2, 4, 6):
        made.save(step, state(step), {"n": step})
    made.wait()
    yield made
    made.close()


def largest(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS]
    return max(files, key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def no_checksums(folder):
    (folder / CHECKSUMS).unlink()


def bad_checksums(folder):
    (folder / CHECKSUMS).write_text("{")


DAMAGE = {
    "truncated": (truncate, "{} is not as it was written"),
    "flipped": (flip, "{} is not as it was written"),
    "missing": (lambda folder: largest(folder).unlink(), "{} is missing"),
    "no checksums": (no_checksums, "checksums.json is missing"),
    "bad checksums": (bad_checksums, "checksums.json is not JSON"),
}


def test_what_is_saved_comes_back(filled):
    found = filled.restore_newest(ABSTRACT)
    assert (found.step, found.meta, int(found.state["step"])) == (6, {"n": 6}, 6)
    np.testing.assert_array_equal(found.state["params"]["kernel"], np.full(1000, 6, np.float32))
    assert filled.steps() == [2, 4, 6]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_loudly(filled, caplog, kind):
    damage, reason = DAMAGE[kind]
    folder = filled.folder / "6"
    reason = reason.format(largest(folder).relative_to(folder))
    damage(folder)
    with caplog.at_level(logging.ERROR):
        found = filled.restore_newest(ABSTRACT)
    assert (found.step, int(found.state["step"])) == (4, 4)
    found_out, moved = [r for r in caplog.records if r.name == "tfm_jax.train.checkpoint"]
    (aside,) = (filled.folder.parent / "damaged_checkpoints").iterdir()
    assert found_out.levelno == moved.levelno == logging.ERROR
    assert found_out.getMessage() == f"CHECKPOINT 6 IS DAMAGED: {reason}. Trying the one before."
    assert moved.getMessage() == f"CHECKPOINT 6 is set aside as {aside}."
    assert aside.name.startswith("6-") and not folder.exists() and filled.steps() == [2, 4]
    # Its number is free for the run to reach it again.
    filled.save(6, state(60), {})
    filled.wait()
    assert int(filled.restore_newest(ABSTRACT).state["step"]) == 60


def test_all_damaged_is_an_error_and_not_a_fresh_start(filled):
    for step, kind in ((2, flip), (4, truncate), (6, no_checksums)):
        kind(filled.folder / str(step))
    message = (
        f"None of the checkpoints [2, 4, 6] in {filled.folder} can be read (see the errors above)."
        " Start in another folder, or delete this one to start over."
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        filled.restore_newest(ABSTRACT)


def test_none_at_all(tmp_path):
    made = Checkpointer(tmp_path / "c")
    assert made.restore_newest(ABSTRACT) is None
    made.close()
    with pytest.raises(UserError, match=re.escape(f"There are no checkpoints in {tmp_path / 'd'}.")):
        Checkpointer(tmp_path / "d", read_only=True)


def test_an_explicit_restore_of_a_damaged_one(filled):
    flip(filled.folder / "4")
    with pytest.raises(CorruptCheckpoint, match="is not as it was written"):
        filled.restore(4, ABSTRACT)
    assert filled.steps() == [2, 4, 6]


def test_an_unfinished_save_is_no_checkpoint(filled):
    """What a kill leaves behind: a folder under its temporary name."""
    half = filled.folder / "8.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    again = Checkpointer(filled.folder)
    assert again.steps() == [2, 4, 6] and again.restore_newest(ABSTRACT).step == 6
    again.close()


def test_the_state_saved_is_the_state_at_the_save(tmp_path):
    """The next steps donate its buffers while it is being written."""
    made = Checkpointer(tmp_path / "c")
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    now = {"x": jnp.full((1 << 20,), 3.0)}
    made.save(1, now, {})
    for _ in range(20):
        now = update(now)
    jax.block_until_ready(now)
    made.wait()
    abstract = {"x": jax.ShapeDtypeStruct((1 << 20,), jnp.float32, sharding=now["x"].sharding)}
    assert np.unique(made.restore(1, abstract).state["x"]).tolist() == [3.0]
    made.close()


def test_every_file_is_in_the_list(filled):
    folder = filled.folder / "6"
    listed = set(json.loads((folder / CHECKSUMS).read_text()))
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.parent != folder}
    assert listed == on_disk and len(listed) >= 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_keep(tmp_path, asynchronous):
    made = Checkpointer(tmp_path / "c", keep=2, asynchronous=asynchronous)
    for step in range(1, 6):
        made.save(step, state(step), {})
    made.wait()
    assert made.steps() == [4, 5] == sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit())
    made.close()


def test_wrong_shapes_are_all_listed(filled):
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=there)

    wanted = {"params": {"kernel": array(7), "bias": array(3)}}
    with pytest.raises(UserError) as found:
        filled.restore(6, wanted)
    assert str(found.value) == (
        f"The checkpoint {filled.folder / '6'} is of another config:\n"
        "  params/kernel: in the model (7,), in the checkpoint (1000,)\n"
        "  params/bias: not in the checkpoint\n"
        "  step: not in the model"
    )
    # Another config is a mistake and no damage: nothing is set aside.
    with pytest.raises(UserError):
        filled.restore_newest(wanted)
    assert filled.steps() == [2, 4, 6]
    part = filled.restore(6, {"params": ABSTRACT["params"]}, partial=True).state
    assert set(part) == {"params"} and float(part["params"]["kernel"][0]) == 6


@pytest.mark.parametrize(
    ("own", "resume", "init_from", "origin", "value"),
    [
        (True, True, True, "continued", 6),
        (True, False, True, "continued", 6),
        (False, True, True, "resumed", 20),
        (False, True, False, "resumed", 20),
        (False, False, True, "initialised", 31),
        (False, False, False, "scratch", 30),
    ],
)
def test_where_a_run_starts(filled, tmp_path, own, resume, init_from, origin, value):
    empty = Checkpointer(tmp_path / "empty")
    found, word = first_state(
        filled if own else empty,
        ABSTRACT,
        resume=(lambda: Restored(state(20), {"n": 20}, 20)) if resume else None,
        initialise=lambda: state(30),
        init_from=(lambda s: jax.tree.map(lambda x: x + 1, s)) if init_from else None,
    )
    empty.close()
    assert (word, int(found.state["step"])) == (origin, value)
    assert found.step == {"continued": 6, "resumed": 20}.get(origin, 0)
