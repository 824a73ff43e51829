import os
from importlib.metadata import version

# Tests compile far longer than they compute.
FAST_COMPILE = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
# Halves the time; other lines of jaxlib do not know it, and stop at what they do not know.
if version("jaxlib").startswith("0.10."):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST_COMPILE}"

import gc  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

from tfm_jax import config as configs  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Traced programs are many objects and few cycles: looking for them more seldom saves 7 % of the whole.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

REPO = Path(__file__).resolve().parents[1]


def _compiled(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """Prepared data and compiled programs of the tests stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    # What one test has compiled no other compiles again, nor does another worker or a command.
    jax.config.update("jax_compilation_cache_dir", str(_compiled(tmp_path_factory)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(_compiled(tmp_path_factory)))
        patch.setenv("TFM_JAX_CACHE", str(folder / "data"))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with two training files and a validation file, 4.4 kB of text."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, word, lines in (("train_a", "whale", 40), ("train_b", "ship", 30), ("valid", "sea", 17)):
        text = "".join(f"The {word} number {i * 7 % 31} sees {i * i} of them.\n" for i in range(lines))
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def raw_config(corpus):
    """A config that trains in a second: one block of width 16 on bytes."""
    return {
        "model": {"name": "gpt", "layers": 1, "width": 16, "heads": 2, "max_len": 16},
        "data": {"source": f"text:{corpus}/*.txt", "tokenizer": "bytes", "seq_len": 8, "batch_size": 8},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 8},
        "checkpoint": {"every": 4},
        "evals": {"validation": {"split": "validation"}},
        "log": {"every": 1, "tensorboard": False},
    }


@pytest.fixture(scope="session")
def make_config(raw_config):
    """`make_config({"optim.lr": 1e-3})`: the resolved tiny config with dotted keys changed."""

    def make(changes=None):
        return configs.resolve(raw_config, [(key, str(value)) for key, value in (changes or {}).items()])

    return make


@pytest.fixture(scope="session")
def config_file(raw_config, tmp_path_factory):
    """The tiny config as a file, for commands."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(
        f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({raw_config!r})\n"
    )
    return path


@pytest.fixture(scope="session")
def command_env(cache_dir, tmp_path_factory):
    """`command_env(devices=1, JAX_PROCESS_ID="0")`: the environment of a command in its own process."""

    def make(devices=1, path="", **more):
        found = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_"))}
        found |= {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(path), str(REPO)])),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(_compiled(tmp_path_factory)),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        return found | more

    return make


@pytest.fixture
def spawn():
    """`spawn(arguments, env=..., cwd=...)`: this Python in its own process; what still runs at the end is killed."""
    started = []

    def start(arguments, **options):
        pipe = subprocess.PIPE
        child = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True, **options)
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture
def start_command(spawn, command_env):
    """Start `python -m experiments.NAME ...`."""

    def start(name, *arguments, env=None, cwd=REPO):
        return spawn(["-m", f"experiments.{name}", *arguments], env=env or command_env(), cwd=cwd)

    return start
