"""A lock for one run per directory. The operating system releases it when a process is killed."""

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
    """Lock a directory for the duration of a ``with`` block, against other processes that call this function.

    The lock is on the file ``.lock``, which contains the process number and is deleted at the end. A file left over
    from a killed process is not locked and does not matter. Forked processes, such as those that read images, do not
    hold the lock. On Windows and file systems without locks this does nothing.

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
            path.unlink()  # before releasing the lock, so that a waiting process sees a different file
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not flock(): a forked process would hold it, too, and may end some seconds later.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the error depends on the system
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"Another run (pid {holder or 'unknown'}) writes to {path.parent}. Wait until it ends, stop it, or use "
                "another --output_dir."
            ) from None
        except OSError:  # the file system has no locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)  # its last owner has deleted it in the meantime
