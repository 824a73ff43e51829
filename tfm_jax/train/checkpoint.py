"""Checkpoints by Orbax: asynchronous, atomic, verified, and restored onto whatever mesh asks. All of Orbax is here."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tfm_jax.errors import UserError
from tfm_jax.paths import flatten

log = logging.getLogger(__name__)
# Orbax numbers its operations for the whole process, and confuses those of several managers at once (seen with 0.12.8).
_ONE_AT_A_TIME = threading.RLock()
CHECKSUMS = "checksums.json"


class CorruptCheckpoint(Exception):
    """A finished checkpoint whose files are not those that were written."""


class Restored(NamedTuple):
    state: Any
    meta: dict[str, Any]
    step: int


class Checkpointer:
    """The checkpoints of one folder, `<folder>/<step>/`.

    A checkpoint is written under a temporary name, its files are hashed, and only then is it renamed, so a folder
    with a number for a name is whole. Saving copies arrays to the host and returns; the rest happens in a thread.
    """

    def __init__(self, folder: Path, *, keep: int = 3, asynchronous: bool = True, read_only: bool = False) -> None:
        self.folder = folder.absolute()
        self._pending: int | None = None
        self._asynchronous = asynchronous
        # Plain zarr files: for models up to a few billion parameters they restore twice as fast as OCDBT.
        handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=False), "meta": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            # A synchronous save is an asynchronous one that is waited for: one code path, one file layout.
            enable_async_checkpointing=not read_only,
            async_options=None if read_only else ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        if read_only and not self.folder.is_dir():
            raise UserError(f"There are no checkpoints in {folder}.")
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> float:
        """Start saving; returns the seconds for which the caller was blocked."""
        start = time.perf_counter()
        self._manager.wait_until_finished()
        self._pending = step
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        with _ONE_AT_A_TIME:
            self._manager.save(step, args=args)
            if not self._asynchronous:
                self._manager.wait_until_finished()
        return time.perf_counter() - start

    def restore(self, step: int, abstract: Any, *, partial: bool = False) -> Restored:
        """The state saved at a step, on the shardings of `abstract`; with `partial`, only what `abstract` names.

        Raises:
          CorruptCheckpoint: a file is missing, truncated or altered.
          UserError: the arrays saved are not those asked for.
        """
        self.verify(step)
        with _ONE_AT_A_TIME:
            return self._restored(step, abstract, partial)

    def _restored(self, step: int, abstract: Any, partial: bool) -> Restored:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        saved = self._manager.item_metadata(step)["state"]
        _check_shapes(abstract, saved, self.folder / str(step), partial)
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=placed, partial_restore=partial)
        # The files are as they were written, so an error from here on (memory, the file system) is not the checkpoint's.
        state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
        return Restored(state, meta, step)

    def shapes(self, step: int) -> Any:
        """The saved state as a tree of abstract arrays without shardings, for readers that do not know it."""
        saved = _as_dict(self._manager.item_metadata(step)["state"])
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), saved, is_leaf=_is_array_metadata)

    def restore_newest(self, abstract: Any) -> Restored | None:
        """The newest checkpoint that can be read; newer ones that cannot are set aside with an error in the log.

        Returns None if there is none at all.

        Raises:
          UserError: there are checkpoints, but none can be read: never start over silently.
        """
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            try:
                restored = self.restore(step, abstract)
            except CorruptCheckpoint as error:
                log.error("CHECKPOINT %d IS DAMAGED: %s. Trying the one before.", step, error)
                damaged.append(step)
                continue
            # Moved only now: if none can be read, all stay where a person can look at them.
            for number in damaged:
                log.error("CHECKPOINT %d is set aside as %s.", number, self._set_aside(number))
            return restored
        if steps:
            raise UserError(
                f"None of the checkpoints {steps} in {self.folder} can be read (see the errors above)."
                " Start in another folder, or delete this one to start over."
            )
        return None

    def wait(self) -> None:
        """Until nothing is being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def verify(self, step: int) -> None:
        """Compare a checkpoint's files with their checksums; process 0 looks, all processes learn the answer."""
        problem = ""
        if jax.process_index() == 0:
            problem = self._problem(self.folder / str(step))
        if jax.process_count() > 1:
            bad = bool(multihost_utils.broadcast_one_to_all(jax.numpy.asarray(bool(problem))))
            problem = problem or ("process 0 found it damaged" if bad else "")
        if problem:
            raise CorruptCheckpoint(problem)

    def _problem(self, folder: Path) -> str:
        listing = folder / CHECKSUMS
        if not listing.is_file():
            return f"{listing.name} is missing"
        try:
            expected: dict[str, str] = json.loads(listing.read_text())
        except ValueError:
            return f"{listing.name} is not JSON"
        for name, digest in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if _digest(path) != digest:
                return f"{name} is not as it was written"
        return ""

    def _write_checksums(self) -> None:
        """Called by Orbax in its thread when all files are written and the folder is not yet renamed."""
        if jax.process_index() != 0:
            return
        found = [p for p in self.folder.iterdir() if p.is_dir() and p.name.startswith(f"{self._pending}.")]
        if len(found) != 1:
            raise RuntimeError(f"Expected one unfinished folder of step {self._pending}, found {found}.")
        files = sorted(p for p in found[0].rglob("*") if p.is_file() and p.parent != found[0])
        digests = {p.relative_to(found[0]).as_posix(): _digest(p) for p in files}
        with open(found[0] / CHECKSUMS, "w") as out:
            json.dump(digests, out)
            out.flush()
            os.fsync(out.fileno())

    def _set_aside(self, step: int) -> Path:
        aside = self.folder.parent / "damaged_checkpoints" / f"{step}-{int(time.time())}"
        if jax.process_index() == 0:
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.folder / str(step), aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return aside


def first_state(
    own: Checkpointer,
    abstract: Any,
    *,
    resume: Callable[[], Restored] | None,
    initialise: Callable[[], Any],
    init_from: Callable[[Any], Any] | None,
) -> tuple[Restored, str]:
    """Where a run starts, and the word for it: `continued`, `resumed`, `initialised` or `scratch`.

    The order is: the run's own newest good checkpoint, then an explicit `resume`, then `init_from` over a fresh
    state, then a fresh state. The run's own comes first, so that an interrupted fine-tune goes on where it was
    instead of starting again from its donor.
    """
    if found := own.restore_newest(abstract):
        return found, "continued"
    if resume is not None:
        return resume(), "resumed"
    state = initialise()
    if init_from is not None:
        return Restored(init_from(state), {}, 0), "initialised"
    return Restored(state, {}, 0), "scratch"


def _check_shapes(abstract: Any, saved: Any, where: Path, partial: bool) -> None:
    """One error that lists every array which is missing, extra, or of another shape."""
    want = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    have = {path: tuple(leaf.shape) for path, leaf in _flatten_metadata(saved).items()}
    lines = [
        f"  {p}: in the model {want[p]}, in the checkpoint {have[p]}" for p in want if p in have and want[p] != have[p]
    ]
    lines += [f"  {p}: not in the checkpoint" for p in want if p not in have]
    lines += [f"  {p}: not in the model" for p in have if p not in want and not partial]
    if lines:
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise UserError(f"The checkpoint {where} is of another config:\n" + "\n".join(lines[:20] + more))


def _is_array_metadata(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _as_dict(saved: Any) -> Any:
    return getattr(saved, "tree", saved)


def _flatten_metadata(saved: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(_as_dict(saved), is_leaf=_is_array_metadata)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if _is_array_metadata(leaf)
    }


def _digest(path: Path) -> str:
    # blake2b runs at about 1 GB/s and lets other threads run meanwhile.
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
