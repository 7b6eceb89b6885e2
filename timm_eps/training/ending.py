"""End a script that fails or is told to stop with a message of one line and the usual exit code."""

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
    """Convert torch's RuntimeError for a failed process of a ``torch.utils.data.DataLoader``.

    Raises:
        ChildProcessError: A process failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.match(r"DataLoader worker|Pin memory thread", str(error)):
            raise
        raise ChildProcessError(
            f"A process that reads images died ({one_line(error)}). If there is not enough memory, "
            "lower --dataloader_num_workers or the batch size."
        ) from error


def _of_another_process(error: str) -> str | None:
    """What happened to another process, from a message of gloo or NCCL; None if the error is of another kind."""
    if re.search("closed by peer|reset by peer|Broken pipe|remote process exit", error):
        return "has ended"
    # A process that was stopped, or a machine that is not reachable, does not close its connections.
    is_silent = re.search("Timed out waiting|Application timeout|wait timeout after", error)
    return "has not answered within --ddp_timeout seconds" if is_silent else None


@contextmanager
def as_script(name: str) -> Iterator[None]:
    """End a script that fails, or is told to stop, with one line: exit code 1, 143 (SIGTERM) or 130 (SIGINT).

    Errors caused by mistakes in the code keep their traceback.

    Args:
        name: First word of the line.
    """
    try:
        with sigterm_as_exception():
            yield
    except InterruptionError as stopped:
        if os.environ.get("RANK", "0") == "0":  # all processes stop, one prints
            print(f"{name}: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    except KeyboardInterrupt as stopped:
        by = str(stopped) or "SIGINT"
        print(f"{name}: Stopped by {by}.", file=sys.stderr)
        raise SystemExit(130 if by == "SIGINT" else 143) from None
    except _TOLD_ERRORS as error:
        raise SystemExit(f"{name}: error: {one_line(error, limit=2000)}.") from error
    except RuntimeError as error:  # from torch.distributed
        if (what := _of_another_process(str(error))) is None:
            raise
        raise SystemExit(
            f"{name}: error: Another process of this training {what}, so this one ends, too. If there is a checkpoint, "
            "start all processes again with the same arguments and --resume_from_checkpoint."
        ) from error
