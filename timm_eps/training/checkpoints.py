"""Directories of a training that is not finished: each is whole, or it is not used.

A checkpoint is written beside its place and renamed when all of it is on the disk, with a list of its files and their
hashes. What a killed process, a full disk or a copy that was cut short left behind is found out by that list.
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
    """``checkpoint-<step>`` in a directory, by step: torn ones as well, and files and links of such a name."""
    named = Path(directory).glob(f"{_PREFIX}*")
    found = [path for path in named if _is_step(path.name.removeprefix(_PREFIX))]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def staging_of(directory: str | os.PathLike, step: int) -> Path:
    """Where the checkpoint of a step is written before :func:`commit`; it is no checkpoint yet."""
    return Path(directory) / f".{_PREFIX}{step}"


def commit(staging: Path) -> Path:
    """Make a checkpoint of what :func:`staging_of` holds, in one rename. Returns its path."""
    hashes = {name: digest(path) for name, path in _files(staging).items()}
    (staging / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
    settle(staging)
    checkpoint = staging.with_name(staging.name.removeprefix("."))
    if os.path.lexists(checkpoint):  # a torn one, or the run comes by here again
        _remove(checkpoint)
    staging.rename(checkpoint)
    to_disk(checkpoint.parent)
    return checkpoint


def why_torn(checkpoint: str | os.PathLike, needed: Collection[str] = ()) -> str | None:
    """What is missing in a checkpoint, or None if it is whole.

    Args:
        checkpoint: Any path.
        needed: Files that it must list, so that a shorter list does not pass for the whole.
    """
    root = Path(checkpoint)
    if not root.is_dir() and os.path.lexists(root):
        return "it is a link to nowhere" if root.is_symlink() and not root.exists() else "it is no directory"
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
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError, OSError, RecursionError):  # no JSON, or no object
        return f"{MANIFEST} is not as it was written"
    return None


def newest_whole(directory: str | os.PathLike, needed: Collection[str] = ()) -> Path | None:
    """The last checkpoint that is whole; warns of each later one that is not. None if there is none."""
    for checkpoint in reversed(all_checkpoints(directory)):
        reason = why_torn(checkpoint, needed)
        if reason is None:
            return checkpoint
        _logger.warning("%s is not whole (%s); the checkpoint before it is used.", checkpoint, reason)
    return None


def discard_oldest(directory: str | os.PathLike, limit: int | None) -> None:
    """Delete the checkpoints before the last ``limit`` whole ones; none if ``limit`` is None."""
    kept = 0
    for checkpoint in reversed(all_checkpoints(directory)) if limit is not None else ():
        if kept == limit:
            if checkpoint.is_dir():  # other things are not of a run
                _remove(checkpoint)
        elif why_torn(checkpoint) is None:  # a torn one takes no place
            kept += 1


def clear_unfinished(directory: str | os.PathLike) -> None:
    """Delete what killed processes left beside the checkpoints."""
    for path in Path(directory).glob(f".{_PREFIX}*"):
        _delete(path)


@contextmanager
def taking_up(checkpoint: str | os.PathLike) -> Iterator[None]:
    """Name the checkpoint in whatever error those raise who read it.

    Raises:
        ValueError: It does not fit.
    """
    try:
        yield
    except MISFIT_ERRORS as error:
        said = one_line(error) if not isinstance(error, KeyError) else f"there is no {one_line(error)}"
        raise ValueError(
            f"{checkpoint} does not fit this run ({said}): it was changed, or written by other versions. Delete it to "
            "go on from the one before, or name another with --resume_from_checkpoint."
        ) from error


def _remove(checkpoint: Path) -> None:
    # Out of sight first: half a checkpoint must not look like one.
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    _delete(hidden)
    checkpoint.rename(hidden)
    _delete(hidden)


def _delete(path: Path) -> None:
    """Of a link only the link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _files(root: Path) -> dict[str, Path]:
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
