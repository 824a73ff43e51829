import re
import shutil

import pytest

from tfm_jax.errors import UserError
from tfm_jax.launch.job import job


@pytest.fixture
def a_job(tmp_path):
    return job(["--config=configs/gpt_stdlib.py", f"--workdir={tmp_path}/run"])


@pytest.fixture
def says():
    """`with says("..."):` the whole of a user's error."""
    return lambda text: pytest.raises(UserError, match=f"^{re.escape(text)}$")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`fake("sbatch", "echo 7")`: a program of that name; no others are on the path but bash and seq."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "seq"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))

    def make(name, body):
        (folder / name).write_text(f"#!{folder}/bash\n{body}\n")
        (folder / name).chmod(0o755)

    return make
