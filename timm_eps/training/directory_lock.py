"""One run in a directory at a time, held by the operating system: a killed process leaves no lock behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "locked"]

LOCK = ".lock"


@contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Keep other processes that call this out of a directory, from ``with`` to the end of the block.

    The lock is on the file ``.lock``, which holds the process number and is deleted at the end. The file alone locks
    nothing, so one that a killed process left does not matter. Processes that this one forks, such as those that read
    images, do not hold the lock. Windows and file systems without locks have none; there this does nothing.

    Args:
        directory: An existing directory.

    Raises:
        ValueError: Another process holds the lock.
        OSError: The directory cannot be written to.
    """
    if fcntl is None:
        yield
        return
    path = Path(directory) / LOCK
    descriptor = _take(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock is given back: whoever waits for this file sees that it is another one
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not flock(): a forked process would hold that too, and outlive this one by some seconds.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # systems differ in which one it is
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"Another run (pid {holder or 'unknown'}) writes to {path.parent}: wait for its end, stop it, or take "
                "another --output_dir."
            ) from None
        except OSError:  # the file system has no locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)  # its last holder has deleted it in the meantime
