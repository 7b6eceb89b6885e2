"""Errors of other libraries as one line: full disks, failed processes, broken connections."""

from __future__ import annotations

import pickle
import re

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

__all__ = ["HTTP_ERRORS", "MISFIT_ERRORS", "NETWORK_ERRORS", "WRITE_ERRORS", "one_line"]

# Errors of huggingface_hub's HTTP library: httpx or its successor. Not all of them are OSErrors.
HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx") and issubclass(base, Exception)
)
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HTTP_ERRORS)
# torch writes files in C++, safetensors in Rust: their errors are not OSErrors either.
WRITE_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, SafetensorError)
# Errors of libraries that read a file with an unexpected or invalid structure.
MISFIT_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error in one line, without secrets.

    Tokens of the Hub are left out, and everything after the ``?`` of an address, which may be a signature. If another
    process sent the error with its traceback, only the error is kept.

    Args:
        error: Any exception.
        limit: Maximum length of the text.
    """
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1]
    text = re.sub(r"hf_\w+", "hf_...", " ".join(text.split()))
    text = re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)
    text = text.rstrip(". ") or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
