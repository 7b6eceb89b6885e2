"""Files that others can read and that outlast a power cut."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["settle", "to_disk"]


def settle(directory: Path) -> list[Path]:
    """Give all files below a directory the permissions of new files, and wait until they have reached the disk.

    safetensors leaves its files to their owner alone.

    Args:
        directory: Directory that nobody else writes into.

    Returns:
        The paths of the files, relative to the directory.
    """
    # The umask cannot be read without setting it, which other threads would see.
    probe = directory / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    files = [path for path in directory.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(mode)
        to_disk(path)
    to_disk(directory)
    return [path.relative_to(directory) for path in files]


def to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a directory, have reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # directories cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
