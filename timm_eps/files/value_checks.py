"""Checks of single values from a file, and their form in messages.

This file imports nothing from the package: a copy of it is saved with the stand-alone code on the Hub.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "check_rate", "check_text", "check_whole", "check_wholes", "is_number", "is_whole", "listed", "refuse", "shortened",
]  # fmt: skip


def shortened(value: object, limit: int = 60) -> str:
    """``repr`` of a value for a message, of at most ``limit`` characters."""
    try:
        text = repr(value[:limit] if isinstance(value, str | bytes | list | tuple) else value)
    except (RecursionError, ValueError):  # nested too deeply, or more digits than Python converts
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else f"{text[:limit]}..."


def refuse(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {shortened(value)}.")


def is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return least <= value <= most  # False for NaN; an int may have any size


def check_whole(name: str, value: object, least: int, most: int) -> None:
    if not is_whole(value, least, most):
        raise refuse(name, f"a whole number from {least} to {most}", value)


def listed(value: object) -> list[Any]:
    """The items of a list or tuple; for anything else, one item that fails every check."""
    return list(value) if isinstance(value, list | tuple) else [value]


def check_wholes(name: str, value: object, least: int, most: int, lengths: range) -> None:
    fits = isinstance(value, list | tuple) and len(value) in lengths
    if not fits or not all(is_whole(item, least, most) for item in listed(value)):
        count = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        raise refuse(name, f"a list of {count} whole numbers from {least} to {most}", value)


def check_rate(name: str, value: object) -> None:
    if not is_number(value, 0.0, 1.0):
        raise refuse(name, "a number from 0 to 1", value)


def check_text(name: str, value: object, most: int = 128) -> None:
    if not (isinstance(value, str) and len(value) <= most):
        raise refuse(name, f"a string of at most {most} characters", value)
