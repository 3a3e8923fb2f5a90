"""Checkpoints that are either complete or absent: an orbax manager, and checksums of every file.

In a workdir, `checkpoints/` has one folder for each saved step. The folder is written under a
temporary name, renamed when it is complete, and then sealed. Sealing writes `checksums.json`, which
has the SHA-256 of every other file in the folder. A folder that does not match its checksums is
moved to `damaged_checkpoints/`, and the checkpoint before it is used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from peerjax.atomic import write_atomically
from peerjax.errors import CheckpointError
from peerjax.optim import is_packed_matrix

CHECKSUMS = "checksums.json"
READ_SIZE = 1 << 22


class Checkpoints:
    """The checkpoints of one run.

    Args:
        workdir: the run's folder.
        keep: number of latest checkpoints to keep.

    Raises:
        CheckpointError: if there are checkpoints, but none is intact.
    """

    def __init__(self, workdir: epath.Path, keep: int):
        self._folder = workdir / "checkpoints"
        if jax.process_index() == 0:
            _set_damaged_aside(self._folder, workdir / "damaged_checkpoints")
        multihost_utils.sync_global_devices("checkpoints verified")
        self._saving: int | None = None
        self._sealed: concurrent.futures.Future[None] | None = None
        self._sealer = concurrent.futures.ThreadPoolExecutor(1)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest intact checkpoint, or `None`."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """Returns the folder of a step's checkpoint."""
        return self._folder / str(step)

    def save(self, step: int, state: Any, next_batch: int) -> None:
        """Starts to save a step in the background, after the previous save has ended.

        Raises:
            CheckpointError: if the previous save failed, or this one cannot start.
        """
        self.wait()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"next_batch": next_batch}),
        )
        self._saving = step
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            raise self._save_error(error) from error
        self._sealed = self._sealer.submit(self._seal, step)

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            CheckpointError: if the save failed.
        """
        sealed, self._sealed = self._sealed, None
        try:
            if sealed is not None:
                sealed.result()
        except Exception as error:
            raise self._save_error(error) from error

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, int]:
        """Reads the checkpoint of a step, and only the fields of `abstract_state` in it.

        Args:
            step: a step that has a checkpoint.
            abstract_state: shapes, dtypes and shardings of the train state.

        Returns:
            `(state, next_batch)`.

        Raises:
            CheckpointError: if the saved state has another structure.
        """
        data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        try:
            restored = restore_part(self.path(step), abstract_state._asdict())
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint {self.path(step)} does not match the state of this version of "
                f"peerjax ({_first_line(error)}); continue with the version that wrote it, or "
                "choose another --workdir"
            ) from error
        return abstract_state._replace(**restored), data["data"]["next_batch"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Waits for the save in progress, also after an error, and shuts down."""
        try:
            self.wait()
        except CheckpointError:
            if error_type is None:
                raise
        finally:
            self._sealer.shutdown()
            # `close` waits for saves in progress, and raises the error of `wait` again.
            with contextlib.suppress(Exception):
                self._manager.close()

    def _seal(self, step: int) -> None:
        """Waits until a step's folder is complete, and writes the checksums of its files."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            text = json.dumps({"files": checksums(self.path(step))}, indent=1)
            write_atomically(self.path(step) / CHECKSUMS, text)

    def _save_error(self, error: Exception) -> CheckpointError:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        good = [step for step in self._manager.all_steps() if step != self._saving]
        last = f"the last good one is of step {max(good)}" if good else "there is no earlier one"
        return CheckpointError(
            f"the checkpoint of step {self._saving} could not be written to {self._folder} "
            f"({reason}); {last}; fix the cause, such as a full disk, and run the same command "
            "again to continue"
        )


def checksums(folder: epath.Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, except the file of checksums."""
    sums = {}
    for path in _files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name != CHECKSUMS:
            sums[name] = _sha256(path)
    return sums


def find_damage(folder: epath.Path) -> str | None:
    """Returns what is wrong with a step's folder, or `None` if it matches its checksums."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    actual = checksums(folder)
    for name, digest in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != digest:
            return f"{name} does not match its checksum"
    return None


def steps_in(workdir: epath.Path) -> list[int]:
    """Returns the steps of all checkpoints in a run's folder, intact or not."""
    return _steps_below(workdir / "checkpoints")


def has_checkpoint(workdir: epath.Path) -> bool:
    """Returns whether a run's folder has a checkpoint that was completely written."""
    folder = workdir / "checkpoints"
    return any((folder / str(step) / CHECKSUMS).exists() for step in steps_in(workdir))


def _steps_below(folder: epath.Path) -> list[int]:
    found = folder.iterdir() if folder.exists() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit())


def find_checkpoint(workdir: epath.Path, step: int | None = None) -> epath.Path:
    """Returns the folder of a step's checkpoint, by default of the newest intact one.

    This function changes no files, because the run may still be in progress.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    folder, steps = workdir / "checkpoints", steps_in(workdir)
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {folder}; train first")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {there}")
    damage = []
    for each in reversed(steps) if step is None else [step]:
        why = find_damage(folder / str(each))
        if why is None:
            return folder / str(each)
        damage.append(f"step {each}: {why}")
    raise CheckpointError(f"no checkpoint in {folder} is intact ({'; '.join(damage)})")


def restore_part(checkpoint: epath.Path, part: dict[str, Any]) -> dict[str, Any]:
    """Reads some fields of a saved train state, and no others.

    Args:
        checkpoint: the folder of a step's checkpoint.
        part: the fields to read, each with the tree of its shapes, dtypes and shardings. A leaf
            that is `ocp.PLACEHOLDER` is not read. Arrays of pools may have room for more or fewer
            experts than the saved ones. What is added is zeros.

    Raises:
        ValueError: if the state has no such leaf, or one of another shape.
    """
    arguments = ocp.args.PyTreeRestore(
        item=part,
        restore_args=jax.tree_util.tree_map_with_path(
            _any_room, ocp.checkpoint_utils.construct_restore_args(part)
        ),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(checkpoint / "state", args=arguments)
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        if isinstance(leaf, jax.ShapeDtypeStruct):  # orbax leaves it as it was asked for
            raise ValueError(f"it has no {jax.tree_util.keystr(path, simple=True, separator='/')}")
    return restored


def _any_room(path: Any, arguments: Any) -> Any:
    """Lets orbax cut or pad the arrays of pools and of their state."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if "pools" not in names or not isinstance(arguments, ocp.ArrayRestoreArgs):
        return arguments
    return dataclasses.replace(arguments, strict=False)


def _set_damaged_aside(folder: epath.Path, aside: epath.Path) -> None:
    """Moves damaged checkpoints away, newest first, until the newest one is intact."""
    steps = _steps_below(folder)
    if steps and not (folder / str(steps[-1]) / CHECKSUMS).exists():
        _move(folder / str(steps.pop()), aside, "was still being written when the run was killed")
    if not steps:
        return
    while steps:
        newest = folder / str(steps.pop())
        damage = find_damage(newest)
        if damage is None:
            return
        _move(newest, aside, f"is damaged ({damage})")
    raise CheckpointError(
        f"no checkpoint in {folder} was intact; all were moved to {aside}; "
        "run the same command again to start from the first step, or restore a copy"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(":.")


def _move(step: epath.Path, aside: epath.Path, why: str) -> None:
    names = [step.name, *(f"{step.name}.{number}" for number in range(1, 1000))]
    target = next(aside / name for name in names if not (aside / name).exists())
    aside.mkdir(parents=True, exist_ok=True)
    step.rename(target)
    message = "the checkpoint of step %s %s; it was moved to %s"
    logging.getLogger(__name__).warning(message, step.name, why, target)


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_SIZE):
            digest.update(chunk)
    return digest.hexdigest()


def abstract(state_shapes: Any, shardings: Any) -> Any:
    """Joins shapes and shardings into the form that `Checkpoints.restore` takes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state_shapes,
        shardings,
    )


def count_parameters(tree: Any) -> int:
    """Returns the number of elements in all leaves, with packed matrices counted as unpacked."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree, is_packed_matrix))
