"""How a script ends that fails or is told to stop: in one line, with the exit code that shells expect."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..hub.failures import NETWORK_ERRORS, one_line
from .interruption import InterruptionError, sigterm_as_exception

__all__ = ["as_script", "reading_images"]

_TOLD_ERRORS: tuple[type[Exception], ...] = (ValueError, ImportError, *NETWORK_ERRORS)


@contextmanager
def reading_images() -> Iterator[None]:
    """Tell apart that a process of a ``torch.utils.data.DataLoader`` died, which torch says by a RuntimeError.

    Raises:
        ChildProcessError: One died.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.match(r"DataLoader worker|Pin memory thread", str(error)):
            raise
        raise ChildProcessError(
            f"A process that reads images died ({one_line(error)}); where memory is short, lower "
            "--dataloader_num_workers or the batch size."
        ) from error


@contextmanager
def as_script(name: str) -> Iterator[None]:
    """End a script that fails, or that is told to stop, in one line: exit code 1, 143 (SIGTERM) or 130 (SIGINT).

    Errors that only a mistake in the code can cause keep their traceback.

    Args:
        name: What the line begins with.
    """
    try:
        with sigterm_as_exception():
            yield
    except InterruptionError as stopped:
        if os.environ.get("RANK", "0") == "0":  # they all stop, one says so
            print(f"{name}: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    except KeyboardInterrupt as stopped:
        by = str(stopped) or "SIGINT"
        print(f"{name}: Stopped by {by}.", file=sys.stderr)
        raise SystemExit(130 if by == "SIGINT" else 143) from None
    except _TOLD_ERRORS as error:
        raise SystemExit(f"{name}: error: {one_line(error, limit=2000)}.") from error
    except RuntimeError as error:  # as torch.distributed says it
        if not re.search("closed by peer|reset by peer", str(error)):
            raise
        raise SystemExit(f"{name}: error: Another process of this training ended ({one_line(error)}).") from error
