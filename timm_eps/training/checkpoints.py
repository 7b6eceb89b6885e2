"""Checkpoint directories of a training. Only complete ones are used.

A checkpoint is written to a temporary directory and renamed when all of it is on the disk, with a list of its files and
their hashes. The list reveals files damaged by a killed process, a full disk or an incomplete copy.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..files.disk import settle, to_disk
from ..files.weight_checks import digest
from ..hub.failures import MISFIT_ERRORS, one_line

__all__ = [
    "all_checkpoints", "clear_unfinished", "commit", "discard_oldest", "newest_whole", "staging_of", "taking_up",
    "why_torn",
]  # fmt: skip

MANIFEST = "manifest.json"
_PREFIX = "checkpoint-"

_logger = logging.getLogger(__name__)


def all_checkpoints(directory: str | os.PathLike) -> list[Path]:
    """``checkpoint-<step>`` in a directory, by step, including damaged ones, and files and links with such names."""
    named = Path(directory).glob(f"{_PREFIX}*")
    found = [path for path in named if _is_step(path.name.removeprefix(_PREFIX))]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def staging_of(directory: str | os.PathLike, step: int) -> Path:
    """Temporary directory for the checkpoint of a step, before :func:`commit`."""
    return Path(directory) / f".{_PREFIX}{step}"


def commit(staging: Path) -> Path:
    """Make a checkpoint of a directory from :func:`staging_of`, in one rename. Returns its path."""
    hashes = {name: digest(path) for name, path in _files(staging).items()}
    (staging / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
    settle(staging)
    checkpoint = staging.with_name(staging.name.removeprefix("."))
    if os.path.lexists(checkpoint):  # a damaged one, or the run passes this step again
        _remove(checkpoint)
    staging.rename(checkpoint)
    to_disk(checkpoint.parent)
    return checkpoint


def why_torn(checkpoint: str | os.PathLike, needed: Collection[str] = ()) -> str | None:
    """The damage of a checkpoint, or None if it is intact.

    Args:
        checkpoint: Any path.
        needed: Files that it must list, so that an incomplete list is detected.
    """
    root = Path(checkpoint)
    if not root.is_dir() and os.path.lexists(root):
        return "it is a broken link" if root.is_symlink() and not root.exists() else "it is not a directory"
    try:
        hashes = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        if not hashes:
            return f"{MANIFEST} lists no files"
        if unlisted := sorted(set(needed) - hashes.keys()):
            return f"{MANIFEST} does not list {unlisted[0]}"
        found = _files(root)
        for name, expected in hashes.items():
            if name not in found:
                return f"{Path(name).name[:100]} is missing"
            if digest(found[name]) != expected:
                return f"{name} was changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError, OSError, RecursionError):  # not JSON, or not an object
        return f"{MANIFEST} was changed"
    return None


def newest_whole(directory: str | os.PathLike, needed: Collection[str] = ()) -> Path | None:
    """The last intact checkpoint, or None. Warns about each later one that is damaged."""
    for checkpoint in reversed(all_checkpoints(directory)):
        reason = why_torn(checkpoint, needed)
        if reason is None:
            return checkpoint
        _logger.warning("%s is damaged (%s); the checkpoint before it is used.", checkpoint, reason)
    return None


def discard_oldest(directory: str | os.PathLike, limit: int | None) -> None:
    """Delete the checkpoints before the last ``limit`` intact ones. With None, delete nothing."""
    kept = 0
    for checkpoint in reversed(all_checkpoints(directory)) if limit is not None else ():
        if kept == limit:
            if checkpoint.is_dir():  # other entries do not belong to a run
                _remove(checkpoint)
        elif why_torn(checkpoint) is None:  # damaged ones do not count
            kept += 1


def clear_unfinished(directory: str | os.PathLike) -> None:
    """Delete temporary directories left over from killed processes."""
    for path in Path(directory).glob(f".{_PREFIX}*"):
        _delete(path)


@contextmanager
def taking_up(checkpoint: str | os.PathLike) -> Iterator[None]:
    """Add the name of the checkpoint to errors that occur while it is read.

    Raises:
        ValueError: The checkpoint does not fit.
    """
    try:
        yield
    except MISFIT_ERRORS as error:
        said = one_line(error) if not isinstance(error, KeyError) else f"there is no {one_line(error)}"
        raise ValueError(
            f"{checkpoint} does not fit this run ({said}): it was changed, or written by other versions. Delete it to "
            "resume from the one before, or choose another with --resume_from_checkpoint."
        ) from error


def _remove(checkpoint: Path) -> None:
    # Rename first, so that a partly deleted checkpoint does not look complete.
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    _delete(hidden)
    checkpoint.rename(hidden)
    _delete(hidden)


def _delete(path: Path) -> None:
    """Delete a directory, or a link without its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _files(root: Path) -> dict[str, Path]:
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
