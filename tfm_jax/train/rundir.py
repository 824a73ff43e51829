"""The run directory: who may write in it, which config it belongs to, and how its small files are written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfm_jax import config as configs
from tfm_jax.errors import UserError, nearest
from tfm_jax.files import write_atomic, write_status


@contextlib.contextmanager
def claim(run: Path) -> Iterator[None]:
    """Hold the run directory against other processes; the kernel lets go when this one ends, however it ends."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a+") as lock:
        for left in reversed(range(5)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if left:
                    time.sleep(0.05)  # `is_claimed` holds it for a moment
                    continue
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise UserError(
                    f"Another process (pid {holder}) is training in {run}. Wait for it, stop it, or use another --workdir."
                ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_claimed(run: Path) -> bool:
    """Whether a process trains in the run directory now; on another machine, as far as their file system shares locks."""
    try:
        with open(run / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def check_config(run: Path, config: configs.Config) -> None:
    """Refuse a run directory that belongs to another config, naming the keys that differ.

    One without a checkpoint holds nothing that could be lost: a start that failed, corrected, begins anew.
    """
    if (lines := differences(run, config)) and has_checkpoint(run):
        raise UserError(
            f"{run} belongs to another config. What differs (its own -> asked for):\n  "
            + "\n  ".join(lines)
            + "\nUse another --workdir, or delete this one."
        )


def differences(run: Path, config: configs.Config) -> list[str]:
    """One line for each fixed key in which a run's config, if it has one yet, and another one differ."""
    if not (run / "config.json").is_file():
        return []
    own = _recorded(run / "config.json")
    # Keys that have been added since the run began have their defaults in it.
    with contextlib.suppress(UserError):
        own = configs.resolve(own)
    return configs.differences(own, _filled_in(own, config))


def _recorded(path: Path) -> configs.Config:
    """A run's `config.json`.

    Raises:
      UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Training writes it anew where there is none.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it is no JSON object. Training writes it anew where there is none.")
    evals = found.get("evals")
    for evaluator in evals.values() if isinstance(evals, dict) else ():
        if isinstance(evaluator, dict) and evaluator.get("name") == "generation":
            _without_lowercase(evaluator)
    return found


def _without_lowercase(section: dict[str, Any]) -> None:
    """A key of older runs, and what is asked for in its place now. What chrF made of it there is no more: that stays, and is
    refused as any key that there is not."""
    metrics, lowercase = section.get("metrics"), section.get("lowercase")
    if lowercase is False:
        del section["lowercase"]
    elif lowercase is True and isinstance(metrics, list) and "chrf" not in metrics:
        del section["lowercase"]
        section["metrics"] = ["bleu_lowercase" if metric == "bleu" else metric for metric in metrics]


def with_own(run: Path, config: configs.Config) -> configs.Config:
    """The config with what a run that has a checkpoint has filled in; neither its donor nor its teacher's folder is needed again."""
    path = run / "config.json"
    return _filled_in(_recorded(path), config) if path.is_file() and has_checkpoint(run) else config


def _filled_in(own: Any, config: Any) -> Any:
    """The config, with the run's own value of a key of `configs.FILLED_IN` where it has None or no such key in a part."""
    if not isinstance(own, dict) or not isinstance(config, dict):
        return config
    out = {key: _filled_in(own.get(key), value) for key, value in config.items()}
    return out | {key: own[key] for key in configs.FILLED_IN if own.get(key) is not None and out.get(key) is None}


def run_folder(path: Path) -> Path:
    """The run of a `RUN/checkpoints/STEP`, or the folder itself."""
    return path.parent.parent if path.name.isdigit() and path.parent.name == "checkpoints" else path


def checkpoint_steps(run: Path) -> list[int]:
    """Steps that have a finished checkpoint, oldest first."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def has_checkpoint(run: Path) -> bool:
    return bool(checkpoint_steps(run))


def begin(run: Path, config: configs.Config, tokenizer: Any) -> None:
    """Write what later commands need: the config, and the tokenizer if there is one."""
    if not has_checkpoint(run):
        shutil.rmtree(run / "tokenizer", ignore_errors=True)
    if not (run / "tokenizer").is_dir() and tokenizer is not None:
        temporary = run / f".tokenizer.{os.getpid()}"
        tokenizer.save(temporary)
        temporary.rename(run / "tokenizer")
    write_atomic(run / "config.json", configs.to_json(config))
    write_status(run, "running", pid=os.getpid())


def nearest_run(run: Path) -> str:
    """A sentence that points from a folder to the runs that stand beside it."""
    return nearest(run.as_posix(), (path.parent.as_posix() for path in run.parent.glob("*/config.json")))


def read_config(run: Path) -> configs.Config:
    """The resolved config of a run.

    Raises:
      UserError: the folder is no run, with the runs that stand beside it, or its config is damaged.
    """
    path = run / "config.json"
    if not path.is_file():
        if (run / "trial.json").is_file():
            raise UserError(f"{run} is a trial of a sweep that has not begun: it has no config.json.")
        raise UserError(f"{run} is not a run directory: it has no config.json.{nearest_run(run)}")
    loaded = _recorded(path)
    if "model" not in loaded:
        raise UserError(
            f"{run} is not a run directory: its config.json has no section 'model'. A model folder is hf:{run}."
        )
    return loaded


def revision() -> str:
    """The code's git commit, with `+changes` if the tree, but for figures written into it, is not clean; `unknown` outside a
    git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        figures = [f":(top,exclude){name}" for name in ("results", "README.md")]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *figures)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    """What the processes run on, in a few words."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


def versions() -> dict[str, str]:
    """Versions of what a checkpoint's numbers depend on."""
    import flax
    import jax
    import optax
    import orbax.checkpoint

    modules = {"jax": jax, "flax": flax, "optax": optax, "orbax-checkpoint": orbax.checkpoint}
    return {"python": sys.version.split()[0], **{name: str(module.__version__) for name, module in modules.items()}}
