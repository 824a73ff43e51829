"""Trials as jobs, with programs that stand for Slurm's: submitted once, found again, cancelled when they are behind."""

import os
import re
import stat
import sys

import pytest

from tests.errors import says
from tfm_jax.launch.slurm import NUMBER
from tfm_jax.sweep import runner, slurm, trials
from tfm_jax.sweep.space import grid, named

LISTED = named(grid({"optim.lr": [0.1, 0.2]}))
# A queue is a folder with a file for each job: its run, its name, and a line when it has ended. A job ends when it is asked for by
# its number for the second time.
PROGRAMS = {
    "sbatch": """
path = sys.argv[2]
text = open(path).read()
assert "--config.optim.lr=" in text and "#SBATCH --partition=gpu" in text
number = str(40 + len(os.listdir(queue)))
name = [line for line in text.splitlines() if line.startswith("#SBATCH --job-name=")][-1].partition("=")[2]
(queue / number).write_text(os.path.dirname(path) + "\\n" + name + "\\n")
print(number + ";cluster")""",
    "squeue": """
if os.environ.get("SILENT"):
    print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr); sys.exit(1)
what, _, wanted = sys.argv[3].partition("=")
if what == "--name":
    for job in queue.iterdir():
        run, name, *ended = job.read_text().splitlines()
        if name in wanted.split(",") and not ended: print(job.name)
    sys.exit()
job = queue / wanted
asked = queue.parent / f"{job.name}.asked"
if asked.exists():
    run = pathlib.Path(job.read_text().splitlines()[0])
    with job.open("a") as out: out.write("ended")
    if os.environ.get("JOB_STATE") and int(job.name) < 44:
        (run / "status.json").write_text('{"state": "%s"}' % os.environ["JOB_STATE"])
    elif says := os.environ.get("JOB_SAYS"):
        (run / f"slurm-{job.name}.log").write_text(says)
    else:
        (run / "status.json").write_text('{"state": "finished"}')
    print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr); sys.exit(1)
asked.touch()
print(job.name)""",
    "scancel": '(queue.parent / "cancelled").write_text(sys.argv[1])',
}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    folder = tmp_path / "queue"
    folder.mkdir()
    for name, body in PROGRAMS.items():
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\nimport os, pathlib, sys\nqueue = pathlib.Path({str(folder)!r})\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the runner waits for them."""
    now = [0.0]
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    return lambda: now[0]


def test_jobs(queue, tmp_path):
    """A launcher that ends leaves its jobs; the next one adopts them and submits what is left."""
    folder, start = tmp_path / "sweep", slurm.starter("a.py", {}, {"partition": "gpu"}, every=0.0)
    source = runner.Listed(LISTED, folder)
    first = start(LISTED[0], folder / LISTED[0].name, 0, 0)
    assert first.lasting and first.poll() is None
    (tmp_path / "40.asked").unlink()
    # It was killed before it could note the number.
    (folder / LISTED[0].name / NUMBER).unlink()
    runner.run(source, folder, start, parallel=2, wait=0.01, say=lambda line: None)
    assert sorted(path.name for path in queue.iterdir()) == ["40", "41"]
    assert (folder / LISTED[0].name / NUMBER).read_text() == "40"
    assert [trials.state(folder / trial.name).word for trial in LISTED] == ["finished", "finished"]
    first.stop()
    assert (tmp_path / "cancelled").read_text() == "40"


def test_names_of_jobs(tmp_path):
    """Of equal trials of two sweeps they differ; squeue takes a comma for the end of a name."""
    one, other = (slurm.job_name(tmp_path / sweep / "lr=0.1,seed=1") for sweep in ("a", "b"))
    assert one != other and re.fullmatch("lr=0.1_seed=1-[0-9a-f]{16}", one)


def test_a_silent_queue(queue, tmp_path, monkeypatch):
    """What may be in the queue already is not submitted."""
    folder, start = tmp_path / "sweep", slurm.starter("a.py", {}, {"partition": "gpu"}, every=0.0)
    runner.Listed(LISTED, folder)
    with says("--sbatch=--job-name=x: a sweep names its jobs itself, to find them again."):
        slurm.starter("a.py", {}, {"sbatch": ["--job-name=x"]})
    run = folder / LISTED[0].name
    monkeypatch.setenv("SILENT", "1")
    with says(
        f"squeue does not say whether {slurm.job_name(run)} is submitted already: slurm_load_jobs error: Unable to contact"
        " slurm controller"
    ):
        start(LISTED[0], run, 0, 0)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with says("There is no squeue here; Slurm's client programs have it (slurm-client on Debian)."):
        start(LISTED[0], run, 0, 0)
    assert not list(queue.iterdir())


@pytest.mark.parametrize(
    ("told", "jobs", "reason"),
    [
        ("step 1\nerror: no such key.\nIt is another.\nsrun: error: task 0: Exited with exit code 2\n", 1, "no such key.\nIt is another."),
        ("error: out of memory.\nAttempt 0 ended with exit code 1.\nkilled\nAttempt 1 ended with exit code 9.\n", 3, "killed"),
    ],
)  # fmt: skip
def test_a_mistake_is_submitted_once_and_its_words_are_kept(queue, clock, tmp_path, monkeypatch, told, jobs, reason):
    monkeypatch.setenv("JOB_SAYS", told)
    folder, start = tmp_path / "sweep", slurm.starter("a.py", {}, {"partition": "gpu"}, clock=clock)
    runner.run(runner.Listed(LISTED[:1], folder), folder, start, wait=1.0, say=lambda line: None)
    assert len(list(queue.iterdir())) == jobs
    assert trials.state(folder / LISTED[0].name)[:2] == ("failed", reason)


def test_being_preempted_is_no_death(queue, clock, tmp_path, monkeypatch):
    """However often: the fifth job finishes."""
    monkeypatch.setenv("JOB_STATE", "preempted")
    folder, start = tmp_path / "sweep", slurm.starter("a.py", {}, {"partition": "gpu"}, clock=clock)
    runner.run(runner.Listed(LISTED[:1], folder), folder, start, wait=1.0, say=lambda line: None)
    assert sorted(path.name for path in queue.iterdir()) == ["40", "41", "42", "43", "44"]
    assert trials.state(folder / LISTED[0].name).word == "finished"
