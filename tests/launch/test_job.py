import pytest

from tfm_jax.launch.job import Ended, job, supervise


def test_the_run_directory_is_found(says):
    for flags in (["--config=c", "--workdir=a/b"], ["--workdir", "a/b", "--config", "c"]):
        made = job(flags)
        assert made.run.as_posix() == "a/b"
        assert made.command("py") == ["py", "-m", "experiments.train", *flags]
    text = "--workdir is not among the training flags: all processes and all attempts share a run directory."
    for flags in ([], ["--config=c"], ["--workdir"], ["--workdir="]):
        with says(text):
            job(flags)


@pytest.mark.parametrize(
    ("codes", "stopped", "restarts", "tried", "code"),
    [
        ([0], False, 3, 1, 0),
        ([1, 75, 0], False, 3, 3, 0),  # a failure, a notice, the end
        ([1, 1, 0], False, 1, 2, 1),
        ([2, 0], False, 3, 1, 2),  # a mistake would be made again
        ([75, 0], True, 3, 1, 75),  # the launcher was told to stop
        ([1, 0], False, 0, 1, 1),
    ],
)
def test_what_is_tried_again(tmp_path, codes, stopped, restarts, tried, code):
    seen = []

    def attempt(last):
        seen.append(last)
        return Ended(codes[len(seen) - 1], "why", stopped)

    assert supervise(tmp_path, attempt, restarts) == code
    assert [last and last.code for last in seen] == [None, *codes[: tried - 1]]


def test_where_it_goes_on(tmp_path, capsys):
    def attempt(last):
        (tmp_path / "checkpoints" / ("5" if last is None else "20.tmp")).mkdir(parents=True)
        return Ended(1 if last is None else 0, "Process 3 died.", False)

    assert supervise(tmp_path, attempt, 2) == 0
    assert capsys.readouterr().err == (
        "launch: Process 3 died.\nlaunch: starting again from the checkpoint of step 5; 1 restarts are left.\n"
    )
