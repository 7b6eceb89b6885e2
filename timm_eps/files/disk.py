"""Make files readable for other users and safe on the disk."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["settle", "to_disk"]


def settle(directory: Path) -> list[Path]:
    """Give all files below a directory the default permissions of new files, and wait until they are on the disk.

    safetensors makes its files readable only for their owner.

    Args:
        directory: Directory that no other process writes to.

    Returns:
        The paths of the files, relative to the directory.
    """
    # Reading the umask requires setting it, which would affect other threads.
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
    """Wait until a file, or the entries of a directory, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
