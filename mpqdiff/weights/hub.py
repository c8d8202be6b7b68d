"""Fetching a repository's folder or file with huggingface_hub, where the user has it."""

from pathlib import Path

from mpqdiff.errors import InputError

FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
OLDER_FILES = ("config.json", "*.bin", "*.bin.index.json")


def download(source: str) -> Path:
    """The local path of "owner/name", "owner/name/folder" or "owner/name/folder/file.pt".

    Raises InputError when huggingface_hub is not installed, or cannot fetch it.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            "--hub needs huggingface_hub (pip install huggingface_hub); or download the files "
            "yourself and give --source their folder"
        ) from error
    owner, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    if not owner or not name:
        raise InputError(f"--hub --source={source}: expected owner/name, with a folder or file")
    repository = f"{owner}/{name}"
    try:
        if Path(inside).suffix:
            return Path(huggingface_hub.hf_hub_download(repository, inside))
        for patterns in (FILES, OLDER_FILES):
            wanted = [f"{inside}/{pattern}" if inside else pattern for pattern in patterns]
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
            folder = folder / inside
            if any(folder.glob(patterns[1])):
                break
        return folder
    except (OSError, ValueError) as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--hub --source={source}: {message[0]}") from error
