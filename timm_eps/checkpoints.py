"""Directories of a training that is not finished: each is whole, or it is not used.

A checkpoint is written beside its place and renamed when all of it is on the disk, with a list of its files and their
hashes. What a killed process, a full disk or a copy that was cut short left behind is found out by that list.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

__all__ = ["all_checkpoints", "clear_unfinished", "commit", "discard_oldest", "newest_whole", "staging_of", "why_torn"]

MANIFEST = "manifest.json"
_PREFIX = "checkpoint-"

_logger = logging.getLogger(__name__)


def all_checkpoints(directory: str | os.PathLike) -> list[Path]:
    """``checkpoint-<step>`` in a directory, by step, torn ones as well."""
    named = (path for path in Path(directory).glob(f"{_PREFIX}*") if path.is_dir())
    found = [path for path in named if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def staging_of(directory: str | os.PathLike, step: int) -> Path:
    """Where the checkpoint of a step is written before :func:`commit`; it is no checkpoint yet."""
    return Path(directory) / f".{_PREFIX}{step}"


def commit(staging: Path) -> Path:
    """Make a checkpoint of what :func:`staging_of` holds, in one rename. Returns its path."""
    hashes = {str(path.relative_to(staging)): _hash(path) for path in sorted(staging.rglob("*")) if path.is_file()}
    (staging / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
    for name in (*hashes, MANIFEST):
        _to_disk(staging / name)
    _to_disk(staging)
    checkpoint = staging.with_name(staging.name.removeprefix("."))
    if checkpoint.exists():  # a torn one, or the run comes by here again
        _remove(checkpoint)
    staging.rename(checkpoint)
    _to_disk(checkpoint.parent)
    return checkpoint


def why_torn(checkpoint: str | os.PathLike) -> str | None:
    """What is missing in a checkpoint, or None if it is whole."""
    root = Path(checkpoint)
    try:
        hashes = json.loads((root / MANIFEST).read_text())
        if not hashes:
            return f"{MANIFEST} lists no files"
        for name, expected in hashes.items():
            if _hash(root / name) != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError, OSError):  # no JSON, no object, or names that no file can have
        return f"{MANIFEST} is not as it was written"
    return None


def newest_whole(directory: str | os.PathLike) -> Path | None:
    """The last checkpoint that is whole; warns of each later one that is not. None if there is none."""
    for checkpoint in reversed(all_checkpoints(directory)):
        reason = why_torn(checkpoint)
        if reason is None:
            return checkpoint
        _logger.warning("%s is not whole (%s); the checkpoint before it is used.", checkpoint, reason)
    return None


def discard_oldest(directory: str | os.PathLike, limit: int | None) -> None:
    """Delete the checkpoints before the last ``limit`` whole ones; none if ``limit`` is None."""
    kept = 0
    for checkpoint in reversed(all_checkpoints(directory)) if limit is not None else ():
        if kept == limit:
            _remove(checkpoint)
        elif why_torn(checkpoint) is None:  # a torn one takes no place
            kept += 1


def clear_unfinished(directory: str | os.PathLike) -> None:
    """Delete what killed processes left beside the checkpoints."""
    for path in Path(directory).glob(f".{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    # Out of sight first: half a checkpoint must not look like one.
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # directories cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
