"""Errors of other libraries, told in one line: full disks, dead processes, lost connections."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from .interruption import InterruptionError, sigterm_as_exception

__all__ = ["HTTP_ERRORS", "MISFIT_ERRORS", "NETWORK_ERRORS", "WRITE_ERRORS", "as_script", "one_line", "reading_images"]

# What the HTTP library of huggingface_hub raises: httpx, or the one after it. Not all of it is an OSError.
HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx") and issubclass(base, Exception)
)
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HTTP_ERRORS)
_TOLD_ERRORS: tuple[type[Exception], ...] = (ValueError, ImportError, *NETWORK_ERRORS)
# torch writes with C++, safetensors with Rust: their errors are no OSErrors either.
WRITE_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, SafetensorError)
# What a file of another structure, or of none, is answered with by those who read it.
MISFIT_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error says, in one line without secrets.

    Tokens of the Hub and what follows the ``?`` of an address, where signatures are, are left out. Of an error that
    another process passed on with its traceback, only the error is kept.

    Args:
        error: Any exception.
        limit: Length to shorten the text to.
    """
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1]
    text = re.sub(r"hf_\w+", "hf_...", " ".join(text.split()))
    text = re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)
    text = text.rstrip(". ") or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


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
