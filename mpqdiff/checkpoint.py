"""Training state on disk: Orbax checkpoints, resumed after a kill from the newest complete one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from mpqdiff.errors import InputError


@contextlib.contextmanager
def manager(folder: Path, *, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """A checkpoint manager for `folder`; leaving the context waits for writes in flight."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    with ocp.CheckpointManager(Path(folder).resolve(), options=options) as checkpoints:
        yield checkpoints
        checkpoints.wait_until_finished()


def save(checkpoints: ocp.CheckpointManager, step: int, state) -> None:
    """Write `state` (a pytree of arrays) as `step`; Orbax renames it into place when complete."""
    checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore_latest(checkpoints: ocp.CheckpointManager, like) -> Any:
    """The newest complete state with the structure, shapes and dtypes of `like`, or None.

    Raises InputError when it is damaged or belongs to another model.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    try:
        return checkpoints.restore(step, args=ocp.args.StandardRestore(like))
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"checkpoint {checkpoints.directory / str(step)} is damaged or of another model "
            f"({error}); delete it, or train in another workdir"
        ) from error
