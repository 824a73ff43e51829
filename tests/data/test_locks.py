import logging
import re
import threading

import pytest

from tfm_jax.data.locks import locked
from tfm_jax.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from tfm_jax.data.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_waits_and_the_death_of_the_first_lets_it_in(tmp_path, start_python, caplog):
    folder = tmp_path / "deep" / "thing"
    child = start_python(HOLD, folder)
    assert child.stdout.readline() == "held\n"
    entered = threading.Event()

    def enter():
        with locked(folder):
            entered.set()

    with caplog.at_level(logging.INFO):
        threading.Thread(target=enter, daemon=True).start()
        assert not entered.wait(0.3)
        child.kill()
        assert entered.wait(10)
    assert caplog.messages == [f"Waiting for another process that is making {folder}."]


def test_different_folders_do_not_wait_for_each_other(tmp_path, start_python):
    child = start_python(HOLD, tmp_path / "one")
    assert child.stdout.readline() == "held\n"
    with locked(tmp_path / "two"):
        assert child.poll() is None


def test_it_can_be_taken_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "thing"):
            assert (tmp_path / "thing.lock").is_file()


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    message = f"The cache folder {tmp_path}/cache/tokens cannot be written: Not a directory."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"), locked(tmp_path / "cache" / "tokens" / "x"):
        pass
