"""What the commands share: flags, logging, the compile cache, errors and exit codes.

Exit codes: 0 success, 1 an error of the program, or another host was lost, 2 a mistake of the user's, 75 preempted (try again:
the same command goes on), 130 interrupted. A job's scheduler sees the highest of its hosts' codes: a lost host's, where it is
higher than the others'.
"""

from __future__ import annotations

import argparse
import glob
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tfm_jax import interrupt
from tfm_jax.errors import UserError, nearest
from tfm_jax.files import folders_beside
from tfm_jax.parallel import watchdog

PREEMPTED = 75
INTERRUPTED = 130
HIDDEN = argparse.SUPPRESS


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends in examples."""
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and the `--config.KEY=VALUE` overrides as pairs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides, rest, i = [], [], 0
    while i < len(arguments):
        if arguments[i].startswith("--config."):
            key, equals, value = arguments[i].removeprefix("--config.").partition("=")
            if not equals:
                i += 1
                if i == len(arguments):
                    made.error(f"--config.{key} needs a value: --config.{key}=VALUE")
                value = arguments[i]
            overrides.append((key, value))
        else:
            rest.append(arguments[i])
        i += 1
    known = {option for action in made._actions for option in action.option_strings}
    if overrides and "--config" not in known:
        made.error(f"--config.{overrides[0][0]}: this command takes no config overrides")
    flags, unknown = made.parse_known_args(rest)
    if unknown:
        made.error(f"unknown argument {unknown[0]!r}.{nearest(unknown[0].partition('=')[0], known)}")
    if getattr(flags, "own_config", False) and flags.config is not None:
        raise UserError(
            f"--config={flags.config}: the config is the run's or the model's own; change it with --config.KEY=VALUE."
        )
    return flags, overrides


def targets(texts: Sequence[str]) -> list[Path]:
    """Runs and checkpoints, and what patterns of them stand for, whoever expands these; of several, what lies beside runs, such
    as a sweep's report, is left out and named. A run that is damaged or has not begun does not.

    Raises:
      UserError: a pattern that stands for nothing.
    """
    from tfm_jax.sweep.results import MARKS
    from tfm_jax.train.rundir import run_folder

    def is_run(path: Path) -> bool:
        # Before it has any mark, training has claimed it.
        return any((path / name).exists() for name in (*MARKS, "checkpoints", ".lock"))

    paths: list[Path] = []
    for text in texts:
        found = [text] if Path(text).exists() or not glob.has_magic(text) else sorted(glob.glob(text))
        if not found:
            raise UserError(f"{text}: no run is called like this.")
        paths += [Path(path) for path in found]
    paths = list(dict.fromkeys(paths))
    beside = [p for p in paths if p.exists() and run_folder(p) == p and not is_run(p)]
    if len(beside) == len(paths):
        return paths
    if beside:
        print(f"Left out, no runs: {', '.join(map(str, beside))}.", file=sys.stderr)
    return [path for path in paths if path not in beside]


def add_average(made: argparse.ArgumentParser) -> None:
    """The flags `--average` and `--decay`."""
    made.add_argument("--average", type=int, default=1, help="average this many checkpoints, the last of them that one")
    made.add_argument(
        "--decay", type=float, default=1.0, help="each of them weighs this much of the next; 1 for the mean"
    )


def add_overrides(made: argparse.ArgumentParser) -> None:
    """`--config.KEY=VALUE` for a command whose config is a run's own: `parse` refuses another one."""
    made.add_argument("--config", help=HIDDEN)
    made.set_defaults(own_config=True)


def given(made: argparse.ArgumentParser, flags: argparse.Namespace, names: Sequence[str]) -> str | None:
    """The first of these flags that is not as it is by default."""
    return next((name for name in names if getattr(flags, name) != made.get_default(name)), None)


def need_folder(flag: str, path: Path) -> None:
    """A folder that a flag names must be there."""
    if not path.is_dir():
        raise UserError(f"{flag}={path}: there is no such folder.{nearest(path.name, folders_beside(path))}")


def averaged(flags: argparse.Namespace) -> dict[str, Any]:
    """`average` and `decay`, as what restores checkpoints takes them."""
    if flags.average < 1:
        raise UserError(f"--average={flags.average}: must be at least 1.")
    if not 0 < flags.decay <= 1:
        raise UserError(f"--decay={flags.decay}: in (0, 1]; 1 for the mean.")
    if flags.decay < 1 and flags.average == 1:
        raise UserError(f"--decay={flags.decay} weighs the checkpoints of --average=N: give both.")
    return {"average": flags.average, "decay": flags.decay}


def setup() -> None:
    """Logging, the compile cache, and the other processes if a launcher started some."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("tfm_jax").setLevel(logging.INFO)
    # Orbax warns at each save that plain zarr files need no merging.
    logging.getLogger("absl").setLevel(logging.ERROR)
    import jax

    from tfm_jax.data.corpus import cache_root
    from tfm_jax.parallel import multihost

    multihost.initialise()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root(None) / "compiled"))
    if not multihost.is_main():
        logging.getLogger("tfm_jax").setLevel(logging.ERROR)


# What the C library's allocator may be told. On CPU, XLA takes its working memory from it anew at each step, and pages that
# went back to the system must be cleared again: so it keeps what it once had, until the process ends, in one arena and in
# huge pages.
FAST = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.arena_max=1"
# Large blocks go back to the system as soon as they are free.
SPARING = "glibc.malloc.mmap_threshold=262144"


def untold() -> dict[str, str]:
    """The environment as a user's shell has it, without what a command of ours tells the allocator."""
    ours = ("GLIBC_TUNABLES", FAST), ("GLIBC_TUNABLES", SPARING)
    return {name: value for name, value in os.environ.items() if (name, value) not in ours}


def _restart_with(tunables: str) -> None:
    """Start this process again, before anything is loaded: the C library reads its tunables once, at the start."""
    started = getattr(sys.modules["__main__"].__spec__, "name", "")
    if not started.startswith("experiments."):
        return  # called from another program, which is not ours to start again
    # A command that another one has started has that one's; what you set yourself stays, unless it is one of these two.
    if sys.platform == "linux" and os.environ.get("GLIBC_TUNABLES") in {None, FAST, SPARING} - {tunables}:
        os.environ["GLIBC_TUNABLES"] = tunables
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(main: Callable[[Sequence[str] | None], int], *, memory: str = FAST) -> None:
    """Call a command's main and exit: a user's mistake is one message, anything else keeps its traceback."""
    _restart_with(memory)
    reason = ""
    try:
        interrupt.listen()
        code = main(None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code, reason = 2, str(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code, reason = INTERRUPTED, "it was interrupted."
    except Exception as error:
        code, reason = _unexpected(error)
    if watchdog.here is not None:
        if code in (0, PREEMPTED) and not reason:
            watchdog.here.finish()
        else:
            watchdog.here.leave(code, reason or f"exit code {code}.")
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _unexpected(error: Exception) -> tuple[int, str]:
    """Exit code and reason of an error that is nobody's mistake here."""
    if lost := watchdog.lost():
        print(
            f"error: {lost} This process stops too; the same command goes on from the newest checkpoint.",
            file=sys.stderr,
        )
        return 1, lost
    traceback.print_exc()
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        print(
            "error: out of memory. What helps, in this order: more microbatches (train.accum),"
            " task.vocab_chunk=8192, model.remat=full, more devices in mesh.fsdp, a smaller data.batch_size.",
            file=sys.stderr,
        )
    return 1, f"{type(error).__name__}: {error}"


def make_folder(flag: str, file: Path) -> None:
    """The folder of a file that is written at the end of long work.

    Raises:
      UserError: there can be none, or the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}={file}: its folder cannot be made: {error.strerror}.") from None
    if file.is_dir():
        raise UserError(f"{flag}={file} is a folder; give a file's name.")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{flag}={file}: you may not write into {file.parent}.")


def python() -> str:
    """What to type for this interpreter: `python` if that is what a shell would find, else its path."""
    found = shutil.which("python")
    if found is not None and Path(found).absolute() == Path(sys.executable).absolute():
        return "python"
    near = os.path.relpath(sys.executable)
    return near if len(near) < len(sys.executable) else sys.executable


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, sort_keys=True), flush=True)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in aligned columns, the first one the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
