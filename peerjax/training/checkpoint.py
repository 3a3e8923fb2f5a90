"""Checkpoints that are whole or not there: an orbax manager, and checksums of every file.

Layout of a workdir's `checkpoints/`: one folder a step, written under a temporary name, renamed
when complete, and then sealed: `checksums.json` inside it has the SHA-256 of every other file.
A folder that is not as it was sealed is moved to `damaged_checkpoints/`, and the step before it
is used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
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
        keep: how many of the latest steps stay.

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
        """The newest intact checkpoint, or `None`."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """The folder of a step's checkpoint."""
        return self._folder / str(step)

    def save(self, step: int, state: Any, next_batch: int) -> None:
        """Starts to save a step in the background, once the save before it has ended.

        Raises:
            CheckpointError: if that earlier save failed, or this one cannot start.
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
            CheckpointError: if it failed.
        """
        sealed, self._sealed = self._sealed, None
        try:
            if sealed is not None:
                sealed.result()
        except Exception as error:
            raise self._save_error(error) from error

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, int]:
        """Reads a step back. What else a checkpoint holds is left out.

        Args:
            step: a step that exists.
            abstract_state: shapes, dtypes and shardings that the train state is to have.

        Returns:
            `(state, next_batch)`.

        Raises:
            CheckpointError: if the state in it has another structure.
        """
        data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        try:
            restored = restore_part(self.path(step), abstract_state._asdict())
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint {self.path(step)} holds another state than this version of "
                f"peerjax keeps ({_first_line(error)}); go on with the version that wrote it, or "
                "choose another --workdir"
            ) from error
        return abstract_state._replace(**restored), data["data"]["next_batch"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Waits for the save in progress, whatever else went wrong, and ends."""
        try:
            self.wait()
        except CheckpointError:
            if error_type is None:
                raise
        finally:
            self._sealer.shutdown()
            # Closing waits for the saves in progress, and raises again what `wait` raised.
            with contextlib.suppress(Exception):
                self._manager.close()

    def _seal(self, step: int) -> None:
        """Waits until a step is in its place, and writes the checksums of its files."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            text = json.dumps({"files": checksums(self.path(step))}, indent=1)
            write_atomically(self.path(step) / CHECKSUMS, text)

    def _save_error(self, error: Exception) -> CheckpointError:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        good = [step for step in self._manager.all_steps() if step != self._saving]
        last = f"the last good one is of step {max(good)}" if good else "there is none before it"
        return CheckpointError(
            f"the checkpoint of step {self._saving} could not be written to {self._folder} "
            f"({reason}); {last}; mend the cause (is the disk full?) and run the same command "
            "again to go on from there"
        )


def checksums(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, except the checksums themselves."""
    sums = {}
    for path in _files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name != CHECKSUMS:
            sums[name] = _sha256(path)
    return sums


def find_damage(folder: epath.Path) -> str | None:
    """Says what is wrong with a step's folder, or `None` if it is as it was written."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    actual = checksums(folder)
    for name, digest in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != digest:
            return f"{name} is not as it was written"
    return None


def steps_in(workdir: epath.Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, intact or not."""
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.exists() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit())


def find_checkpoint(workdir: epath.Path, step: int | None = None) -> epath.Path:
    """The folder of a step's checkpoint; of the newest intact one by default.

    Changes nothing: the run may still be going on.

    Raises:
        CheckpointError: if there is none, or the one asked for is damaged.
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
        checkpoint: the folder of a step.
        part: by field, the tree of shapes, dtypes and shardings that it is to have. A leaf that
            is `ocp.PLACEHOLDER` is not read.

    Raises:
        ValueError: if the state has no such leaf, or one of another shape.
    """
    arguments = ocp.args.PyTreeRestore(
        item=part,
        restore_args=ocp.checkpoint_utils.construct_restore_args(part),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(checkpoint / "state", args=arguments)
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        if isinstance(leaf, jax.ShapeDtypeStruct):  # orbax leaves it as it was asked for
            raise ValueError(f"it has no {jax.tree_util.keystr(path, simple=True, separator='/')}")
    return restored


def _set_damaged_aside(folder: epath.Path, aside: epath.Path) -> None:
    """Moves newer damaged steps away until the newest one is intact."""
    if not folder.exists():
        return
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
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
    """Joins shapes and shardings, as `Checkpoints.restore` wants them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state_shapes,
        shardings,
    )


def count_parameters(tree: Any) -> int:
    """Number of elements in all leaves; a packed matrix has those of the matrix."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree, is_packed_matrix))
