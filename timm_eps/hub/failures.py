"""Errors of other libraries, told in one line: full disks, dead processes, lost connections."""

from __future__ import annotations

import pickle
import re

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

__all__ = ["HTTP_ERRORS", "MISFIT_ERRORS", "NETWORK_ERRORS", "WRITE_ERRORS", "one_line"]

# What the HTTP library of huggingface_hub raises: httpx, or the one after it. Not all of it is an OSError.
HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx") and issubclass(base, Exception)
)
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HTTP_ERRORS)
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
