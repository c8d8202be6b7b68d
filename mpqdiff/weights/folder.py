"""Weights as a folder: an Orbax checkpoint in `params/`, and the model in `model.json`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from mpqdiff.errors import InputError

PARAMS, MODEL = "params", "model.json"


def save(folder: Path, params: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Write {path: array} and the JSON object `record`, which has a "model".

    Not atomic: `folder`, which must not exist, is a name that nobody reads.
    """
    import orbax.checkpoint as ocp  # slow to import

    folder.mkdir()
    # Compressing, which saves 7 % of float weights, would hold a third copy of all of them.
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        nested = traverse_util.unflatten_dict(params, sep="/")
        checkpointer.save((folder / PARAMS).resolve(), ocp.args.PyTreeSave(nested))
    (folder / MODEL).write_text(json.dumps(record, indent=1) + "\n")


def load(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """({path: float32 array}, record). Raises InputError when the folder is not one of these, is
    incomplete or damaged."""
    import orbax.checkpoint as ocp

    if not (folder / MODEL).is_file():
        raise InputError(
            f"weights {folder}: a folder without {MODEL}; expected one that mpqdiff convert wrote "
            "(--out=FOLDER/)"
        )
    try:
        record = json.loads((folder / MODEL).read_text())
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1)
        with ocp.Checkpointer(handler) as checkpointer:
            held = checkpointer.restore((folder / PARAMS).resolve(), ocp.args.PyTreeRestore())
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"weights {folder}: cut short or damaged ({error})") from error
    flat: dict[str, Any] = traverse_util.flatten_dict(held, sep="/")
    return {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}, record
