"""The run directory: one writer, one config, whole files."""

import fcntl
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic, write_status
from tfm_jax.train import rundir


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "status.json"
    write_atomic(path, "old")
    before = path.open()  # a reader that opened the file before sees the old text to its end
    write_atomic(path, "new")
    assert (before.read(), path.read_text()) == ("old", "new")
    assert os.listdir(tmp_path) == ["status.json"]
    before.close()


def test_writers_with_the_same_number_do_not_meet(tmp_path, monkeypatch):
    """Two hosts write a file at once: each replaces it with its own, and one that cannot leaves nothing."""
    path = tmp_path / "status.json"

    def replace(source, target):
        monkeypatch.undo()
        write_atomic(path, "another's")
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="full"):
            write_atomic(path, "nobody's")
        monkeypatch.undo()
        os.replace(source, target)

    def full(source, target):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", replace)
    write_atomic(path, "own")
    assert path.read_text() == "own" and os.listdir(tmp_path) == ["status.json"]


def test_status(tmp_path):
    write_status(tmp_path, "failed", "because", step=3)
    found = json.loads((tmp_path / "status.json").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", found.pop("time"))
    assert found == {"state": "failed", "reason": "because", "step": 3}


def test_one_process_at_a_time(tmp_path):
    run = tmp_path / "new" / "run"
    assert not rundir.is_claimed(run)
    with rundir.claim(run):
        assert rundir.is_claimed(run)
        # A lock is the process's own, so another one has to try.
        code = "import sys, pathlib\nfrom tfm_jax.train import rundir\n"
        code += "with rundir.claim(pathlib.Path(sys.argv[1])): print('in')"
        other = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, timeout=60)
        assert other.returncode != 0 and other.stdout == ""
        assert (
            f"UserError: Another process (pid {os.getpid()}) is training in {run}. Wait for it, stop it, or use another"
            " --workdir." in other.stderr
        )
    assert not rundir.is_claimed(run)
    with open(run / ".lock") as looked_at:
        # One that only looks lets go again.
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        threading.Timer(0.05, looked_at.close).start()
        with rundir.claim(run):
            pass


def test_a_run_that_began_before_a_key_was_added_goes_on(tmp_path, make_config):
    older = make_config()
    del older["optim"]["layer_decay"], older["checkpoint"]["layers"], older["evals"]["validation"]["data"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    rundir.check_config(tmp_path, make_config())
    with pytest.raises(UserError, match=r"optim\.layer_decay: 1\.0 -> 0\.9"):
        rundir.check_config(tmp_path, make_config({"optim.layer_decay": 0.9}))


def test_another_config_is_refused(tmp_path, make_config):
    rundir.check_config(tmp_path, make_config())  # an empty folder is anybody's
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    rundir.check_config(tmp_path, make_config({"log.every": 3}))
    # Nothing is lost by another config as long as there is no checkpoint.
    rundir.check_config(tmp_path, make_config({"optim.lr": 0.5}))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError) as found:
        rundir.check_config(tmp_path, make_config({"optim.lr": 0.5, "train.seed": 1}))
    assert str(found.value) == (
        f"{tmp_path} belongs to another config. What differs (its own -> asked for):\n"
        "  optim.lr: 0.01 -> 0.5\n  train.seed: 0 -> 1\nUse another --workdir, or delete this one."
    )


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_config_is_said(tmp_path, make_config, text):
    (tmp_path / "config.json").write_text(text)
    for read in (lambda: rundir.check_config(tmp_path, make_config()), lambda: rundir.read_config(tmp_path)):
        with pytest.raises(UserError, match=f"^{tmp_path}/config.json is damaged: .*Training writes it anew"):
            read()


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text('{"model": {}}')
    with pytest.raises(UserError) as found:
        rundir.read_config(tmp_path / "frist")
    assert str(found.value) == (
        f"{tmp_path}/frist is not a run directory: it has no config.json. Did you mean '{tmp_path}/first'?"
    )
    assert rundir.read_config(tmp_path / "first") == {"model": {}}
    # An evaluator's key that is no more.
    beam = {"name": "generation"}
    for said, asked in (
        (beam | {"metrics": ["bleu", "chrf"], "lowercase": False}, beam | {"metrics": ["bleu", "chrf"]}),
        (beam | {"metrics": ["bleu", "rouge"], "lowercase": True}, beam | {"metrics": ["bleu_lowercase", "rouge"]}),
        # What has nothing in its place stays, and so does what is not ours.
        (kept := beam | {"metrics": ["bleu", "chrf"], "lowercase": True}, kept),
        (kept := beam | {"metrics": None, "lowercase": True}, kept),
        (kept := {"name": "my_lab.evals:make", "lowercase": True}, kept),
    ):
        config = {"model": {}, "evals": {"test": said, "loss": {}}}
        (tmp_path / "first" / "config.json").write_text(json.dumps(config))
        assert rundir.read_config(tmp_path / "first")["evals"] == {"test": asked, "loss": {}}
    # Nor does a wrong one become an error of another kind.
    for evals in (None, [], {"test": None}):
        (tmp_path / "first" / "config.json").write_text(json.dumps({"model": {}, "evals": evals}))
        assert rundir.read_config(tmp_path / "first")["evals"] == evals
    (tmp_path / "first" / "config.json").write_text('{"architectures": []}')
    with pytest.raises(UserError) as found:
        rundir.read_config(tmp_path / "first")
    assert str(found.value) == (
        f"{tmp_path}/first is not a run directory: its config.json has no section 'model'. A model folder is"
        f" hf:{tmp_path}/first."
    )


def test_revision_and_versions():
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", rundir.revision())
    assert rundir.versions()["python"] == sys.version.split()[0]
    assert set(rundir.versions()) == {"python", "jax", "flax", "optax", "orbax-checkpoint"}
