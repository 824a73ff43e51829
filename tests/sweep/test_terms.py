"""A study's storage: a damaged journal, and what an error shows of a database's address."""

import functools
import json
from pathlib import Path

import pytest

from tests.errors import says
from tests.sweep.test_study import Quick, drawn, runner, wanted
from tfm_jax.sweep import terms


def test_a_journal_that_a_full_disk_has_cut(tmp_path):
    """The study goes on without the line that has no end, as it would undisturbed; another damaged line is named."""
    study = wanted(sampler="random", trials=2)
    runner.run(drawn(tmp_path / "quiet", study), tmp_path / "quiet", Quick, wait=0.0, say=lambda line: None)
    whole = (tmp_path / "quiet" / "study.log").read_bytes()
    lines = whole.splitlines(keepends=True)
    folder, journal = tmp_path / "cut", tmp_path / "cut" / "study.log"
    for kept in (0, 1, 3, len(lines) - 1):
        folder.mkdir(exist_ok=True)
        journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        source = drawn(folder, study)
        runner.run(source, folder, Quick, wait=0.0, say=lambda line: None)
        assert source.best() == drawn(tmp_path / "quiet", study).best()
        assert all(json.loads(line) for line in journal.read_text().splitlines())
    journal.write_bytes(lines[0] + lines[1][:20] + whole[len(lines[0]) :])
    with pytest.raises(terms.UserError, match=rf"^{journal}, line 2, is damaged: .*, or use another --workdir\.$"):
        drawn(folder, study)


def test_no_password_is_shown(tmp_path, monkeypatch):
    url = "postgresql://me:pass:/word@host:5432/db"

    monkeypatch.setattr(terms, "AGAIN_S", 0.0)

    def broken(url):
        raise ValueError(f"cannot connect to {url}\nand more")

    monkeypatch.setattr("optuna.storages.RDBStorage", broken)
    address = "postgresql://me:***@host:5432/db"
    with says(f"--storage={address} cannot be opened: ValueError: cannot connect to {address}"):
        terms.storage(terms.optuna(), tmp_path, url)

    def without_driver(url):
        raise ImportError("no module")

    monkeypatch.setattr("optuna.storages.RDBStorage", without_driver)
    with says(
        f"--storage={address} needs the driver of its database: pip install psycopg2-binary for PostgreSQL, pymysql for MySQL."
    ):
        terms.storage(terms.optuna(), tmp_path, url)
    for plain in ("sqlite:///a/b.db", "postgresql://me@host/db", "postgresql:///db?user=me"):
        assert terms.shown(plain) == plain


def test_two_that_make_a_databases_tables_at_once(tmp_path, monkeypatch):
    """The one that fails finds them made."""
    made, tries = terms.optuna().storages.RDBStorage, []

    def first_too_late(url):
        tries.append(url)
        if len(tries) == 1:
            raise ValueError("table trials already exists")
        return made(url)

    monkeypatch.setattr(terms, "AGAIN_S", 0.0)
    monkeypatch.setattr("optuna.storages.RDBStorage", first_too_late)
    assert terms.storage(terms.optuna(), tmp_path, f"sqlite:///{tmp_path}/a.db").get_all_studies() == []
    assert len(tries) == 2


def test_the_lock_of_one_that_was_killed(tmp_path, monkeypatch):
    """Of a folder that is named from where one stands, too: after a while without news of the journal it is nobody's."""
    journal = terms.optuna().storages.journal
    patient = functools.partial(journal.JournalFileSymlinkLock, grace_period=1)
    monkeypatch.setattr(journal, "JournalFileSymlinkLock", patient)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").mkdir()
    terms.storage(terms.optuna(), Path("sweep"), None)._backend._lock.acquire()
    assert (tmp_path / "sweep" / "study.log.lock").exists(), "A link that leads nowhere is waited for without end."
    assert terms.storage(terms.optuna(), Path("sweep"), None).get_all_studies() == []
