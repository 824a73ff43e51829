"""The commands as a user meets them: help, JSON, exit codes, and what a typing mistake says."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import cli, evaluate, generate, report, train
from tests.errors import says
from tfm_jax.errors import UserError

COMMANDS = {"train": train, "evaluate": evaluate, "generate": generate, "report": report}


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """A run made by the command itself, and what it printed."""
    run = tmp_path_factory.mktemp("commands") / "run"
    printed = pytest.MonkeyPatch()
    lines = []
    printed.setattr("builtins.print", lambda *a, **k: lines.append(" ".join(map(str, a))))
    try:
        code = train.main([f"--config={config_file}", f"--workdir={run}", "--json"])
    finally:
        printed.undo()
    return run, code, lines


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(name, capsys):
    with pytest.raises(SystemExit) as found:
        COMMANDS[name].main(["--help"])
    out = capsys.readouterr().out
    assert found.value.code == 0
    assert "examples:\n" + COMMANDS[name].EXAMPLES in out and f"python -m experiments.{name}" in out
    assert " ".join(str(COMMANDS[name].__doc__).split()[:4]) in out


def test_train_prints_json_last(finished):
    run, code, lines = finished
    assert code == 0
    found = json.loads(lines[-1])
    assert found == {"status": "finished", **json.loads((run / "result.json").read_text())}
    text = "\n".join(lines)
    for wanted in ("Finished 8 steps in", "bits per byte", "gzip -9", "xz -9", "A sample:", f"--run {run}"):
        assert wanted in text
    assert f"{found['eval/validation/bits_per_byte']:.3f}" in text


def greedy(run, capsys, *more):
    assert generate.main(["--run", str(run), "--prompt", "The ", "--max_new", "8", "--json", *more]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_greedy_text_is_reproducible(finished, capsys):
    run = finished[0]
    first, out = greedy(run, capsys, "--temperature", "0")
    again, _ = greedy(run, capsys, "--temperature", "0", "--seed", "5")
    whole, plain = greedy(run, capsys, "--temperature", "0", "--no_stream")
    assert first["text"] == again["text"] == whole["text"]
    assert (first["step"], first["prompt"]) == (8, "The ") and 0 < first["tokens"] <= 8 and first["seconds"] > 0
    # The prompt, then the text, streamed or not.
    assert out.startswith("The " + first["text"]) and plain.startswith("The " + first["text"])
    drawn = {greedy(run, capsys, "--seed", str(seed), "--temperature", "1.5")[0]["text"] for seed in range(3)}
    assert len(drawn) > 1


def test_evaluate_a_step(finished, capsys):
    run = finished[0]
    assert evaluate.main(["--run", str(run), "--steps", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (line,) = (run / "evaluations.jsonl").read_text().splitlines()
    assert found["step"] == 4 and json.loads(line)["results"].items() <= found.items()
    for command, flag in ((evaluate, "--steps"), (generate, "--step")):
        with pytest.raises(UserError) as wrong:
            command.main(["--run", str(run), flag, "5"])
        assert str(wrong.value) == f"{run} has no checkpoint of step 5. There are: 4, 8."


def test_report_of_a_run(finished, capsys):
    run = finished[0]
    flags = ["--prompt", "The ", "--attend", "The <sea>", "--heads", "0.1", "--json"]
    assert report.main([str(run), *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["runs"] == 1 and found["best"] == run.name
    assert [path.rpartition("/")[2] for path in found["pictures"]] == ["curves.png", "attention.png"]
    page = (run / "report" / "index.html").read_text()
    assert "<figcaption>The </figcaption><pre>The " in page and "0.1  stack/block_0/attention" in page
    assert "All settings" in page and "<td>optim.lr</td><td>0.01</td>" in page
    with says("--heads=1.0: heads are LAYER.HEAD, from 0.0 to 0.1."):
        report.main([str(run), "--attend", "sea", "--heads", "1.0"])


def test_evaluate_on_another_split(finished, capsys):
    run = finished[0]
    new = ["--config.evals.train.name=loss", "--config.evals.train.split=train"]
    assert evaluate.main(["--run", str(run), *new, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["eval/train/tokens"] > found["eval/validation/tokens"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--config=x", "--wrkdir=a"], "unknown argument '--wrkdir=a'. Did you mean '--workdir'?"),
        ("evaluate", ["--run=x", "--stpe=1"], "unknown argument '--stpe=1'. Did you mean '--steps'?"),
        ("generate", ["--run=x", "--top-k=1"], "unknown argument '--top-k=1'. Did you mean '--top_k'?"),
        ("train", ["--config=x", "--config.optim.lr"], "--config.optim.lr needs a value: --config.optim.lr=VALUE"),
        ("generate", ["--run=x", "--config.a=1"], "--config.a: this command takes no config overrides"),
    ],
)
def test_unknown_flags(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as found:
        COMMANDS[command].main(arguments)
    assert found.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(f"error: {message}")


def test_other_mistakes(config_file, tmp_path, capsys):
    with pytest.raises(UserError) as found:
        train.main([f"--config={config_file}"])
    assert str(found.value) == "--workdir is not set: where should the run go? For instance --workdir=runs/first"
    with pytest.raises(UserError) as found:
        train.main([f"--config={config_file}", f"--workdir={tmp_path}/r", "--profile=a:b"])
    assert str(found.value) == "--profile=a:b: write STEP:COUNT, for instance 20:5."
    with pytest.raises(UserError) as found:
        generate.main(["--run", str(tmp_path)])
    assert str(found.value).startswith(f"{tmp_path} is not a run directory: it has no config.json.")


@pytest.mark.parametrize(("flags", "message"), [
    (["--beams=2", "--temperature=0.5"], "--temperature=0.5: --beams draws no token."),
    (["--length_penalty=0.5"], "--length_penalty=0.5: is of beam search: give --beams too."),
])  # fmt: skip
def test_flags_that_would_do_nothing(flags, message):
    with says(message):
        generate.main(["--run=somewhere", *flags])


def test_overrides_with_a_space():
    made = cli.parser("x", "y")
    made.add_argument("--config")
    flags, overrides = cli.parse(made, ["--config.a.b", "1", "--json", "--config.c=d=e", "--config=f"])
    assert overrides == [("a.b", "1"), ("c", "d=e")] and flags.json and flags.config == "f"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (UserError("like this"), 2, "error: like this\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (ValueError("broken"), 1, "ValueError: broken\n"),
        (MemoryError(), 1, "error: out of memory. What helps"),
    ],
)
def test_exit_codes(raised, code, said, capsys):
    def main(argv):
        if raised is not None:
            raise raised
        return 0

    with pytest.raises(SystemExit) as found:
        cli.run(main)
    error = capsys.readouterr().err
    assert found.value.code == code and said in error
    assert ("Traceback" in error) == (code == 1)


@pytest.mark.parametrize("tunables", [cli.FAST, cli.SPARING])
def test_the_allocator_takes_what_it_is_told(tunables):
    """The C library says nothing of a name that it does not know."""
    loader = next((path for name in ("/lib64", "/lib") for path in Path(name).glob("ld-linux-*.so.*")), None)
    if loader is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("this system has no glibc")
    told = subprocess.run(
        [loader, "--list-tunables"], env={"GLIBC_TUNABLES": tunables}, capture_output=True, text=True, check=False
    )
    if told.returncode:
        pytest.skip("this C library lists no tunables")
    found = dict(line.split(" (")[0].split(": ") for line in told.stdout.splitlines() if " (" in line)
    for name, value in (pair.split("=") for pair in tunables.split(":")):
        assert int(found[name], 0) == int(value), name


@pytest.mark.parametrize(("ours", "other"), [(cli.FAST, cli.SPARING), (cli.SPARING, cli.FAST)])
def test_who_decides_on_the_allocator(ours, other, monkeypatch):
    """The command does, and not the one that has started it; what else is set is the user's. It starts again once."""
    started = list[str]()
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(os.environ["GLIBC_TUNABLES"]))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="experiments.train"))
    for before, after in ((None, [ours]), (other, [ours]), (ours, []), ("", []), ("x.y=1", [])):
        started.clear()
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        if before is not None:
            monkeypatch.setenv("GLIBC_TUNABLES", before)
        cli._restart_with(ours)
        assert started == after, before
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="pytest.__main__"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    cli._restart_with(ours)
    assert started == []


def test_a_file_that_can_have_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with says(f"--to={tmp_path}/file/new/a.npy: its folder cannot be made: Not a directory."):
        cli.make_folder("--to", tmp_path / "file" / "new" / "a.npy")
    cli.make_folder("--to", tmp_path / "new" / "er" / "a.npy")
    assert (tmp_path / "new" / "er").is_dir()
    with says(f"--table={tmp_path}/new is a folder; give a file's name."):
        cli.make_folder("--table", tmp_path / "new")
    monkeypatch.setattr(os, "access", lambda folder, how: (folder, how) != (tmp_path / "new", os.W_OK))
    with says(f"--to={tmp_path}/new/a.npy: you may not write into {tmp_path}/new."):
        cli.make_folder("--to", tmp_path / "new" / "a.npy")


def test_a_mistake_in_a_process_of_its_own(config_file, command_env):
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config={config_file}",
        "--config.optim.lrr=1",
        "--workdir=x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=command_env())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --config.optim.lrr=1: unknown key 'optim.lrr'. Did you mean 'optim.lr'?\n"


def test_print_sharding(config_file, capsys):
    assert train.main([f"--config={config_file}", "--config.mesh.fsdp=4", "--print_sharding"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["parameter", "shape", "dtype", "spec", "MiB/device", "note"]
    (row,) = [line for line in lines if line.startswith("params/stack/block_0/mlp/up/kernel ")]
    assert "16x64" in row and "('fsdp', None)" in row
