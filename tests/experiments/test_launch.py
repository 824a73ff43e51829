"""The command: backends by name, their flags from their signatures, and mistakes found before anything is started."""

import pytest

from experiments import launch
from tfm_jax.errors import UserError

TRAIN = ["--", "--config=configs/gpt_stdlib.py:smoke", "--workdir=runs/x"]


def refused(*arguments):
    with pytest.raises(UserError) as found:
        launch.main(list(arguments))
    return str(found.value)


def test_mistakes():
    assert refused("--backend=lokal", *TRAIN) == "--backend='lokal' does not exist. Did you mean 'local'?"
    assert refused("--backend=local").startswith("Nothing to train: write -- and then the flags of experiments.train")
    assert refused("--backend=local", *TRAIN[:2]).startswith("--workdir is not among the training flags")
    assert refused("--backend=local", "--", "--workdir=x") == "--config is not among the training flags."
    wrong = "--config.optim.lrr=3: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"
    assert refused("--backend=local", *TRAIN, "--config.optim.lrr=3") == wrong


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backend=local", "--proceses=2"], "unknown argument '--proceses=2'. Did you mean '--processes'?"),
        (["--backend=slurm", "--processes=2"], "unknown argument '--processes=2'."),
        (["--backend=local", "--platform=gpu"], "invalid choice: 'gpu' (choose from"),
        (["--backend=k8s"], "the following arguments are required: --image, --volume"),
        ([], "the following arguments are required: --backend"),
    ],
)
def test_mistakes_in_flags(arguments, text, capsys):
    with pytest.raises(SystemExit) as found:
        launch.main([*arguments, *TRAIN])
    assert found.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["local", "slurm", "k8s", "tpu"])
def test_help_has_a_line_for_each_setting(name, capsys):
    """A setting without a word in the docstring is an error of the program."""
    with pytest.raises(SystemExit) as found:
        launch.main([f"--backend={name}", "--help"])
    out = capsys.readouterr().out
    assert found.value.code == 0 and f"--backend {name}:" in out and "--dry_run" in out
    assert "examples:\n" + launch.EXAMPLES in out


def test_a_backend_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_cluster.py").write_text(
        "from collections.abc import Sequence\n\n\n"
        "def launch(job, *, queue: str, cores: int = 4, tags: Sequence[str] = ()) -> int:\n"
        '    """Queue it.\n\n    Args:\n      queue: whose\n        turn it is.\n      cores: how many.\n      tags: any.\n    """\n'
        "    print(job.run, queue, cores, *tags)\n    return 75\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        launch.main(["--backend=my_cluster:launch", "--queue=long", "--cores=8", "--tags=a", "--tags=b", *TRAIN]) == 75
    )
    assert launch.main(["--backend=my_cluster:launch", "--queue=long", *TRAIN]) == 75
    assert capsys.readouterr().out == "runs/x long 8 a b\nruns/x long 4\n"


def test_local_dry_run(capsys):
    assert launch.main(["--backend=local", "--processes=2", "--devices=2", "--dry_run", *TRAIN]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("JAX_NUM_CPU_DEVICES=2 ") for line in lines] == [1, 1]
    assert all(line.endswith("--config=configs/gpt_stdlib.py:smoke --workdir=runs/x") for line in lines)
