"""Ctrl-C where it might be lost: in a destructor before the loop begins, and while a command is being imported."""

import signal
import subprocess
import sys

import pytest

from tfm_jax import interrupt
from tfm_jax.train.stop import StopRequest


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_destructor_has_lost_is_remembered(monkeypatch):
    class Last:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(interrupt, "asked", False)
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt.listen()
        with StopRequest() as stop:
            assert not stop.told(0)
        last = Last()
        del last
        with StopRequest() as stop:
            assert stop.told(0) and stop.name == "SIGINT"
            # The second one stops at once.
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt.listen()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_while_a_command_is_imported(command_env):
    """One word, whatever the import would have made of it."""
    slow = "import time; print('here', flush=True); time.sleep(60)"
    plain = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv[0] = '-m'"
    begin = f"{plain}; import experiments; {slow}"
    with subprocess.Popen(
        [sys.executable, "-c", begin], env=command_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert (process.wait(), process.stderr.read()) == (130, "stopped\n")
