"""Declare an argument once, as a typed field of a dataclass and as a flag of the command line."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

__all__ = ["add_flags", "at_least", "finite", "flag", "fraction_or_number", "json_object", "not_negative", "option",
           "share", "steps_or_epoch"]  # fmt: skip


def option(help: str, type: Callable[[str], Any] = str, default: Any = None, **of_flag: Any) -> Any:
    """A field that a flag sets.

    transformers' ``HfArgumentParser`` derives the flag from the annotation of a field. An annotation cannot express
    that a number must be a share, or that an argument is a share or a number, so the flag is described separately.

    Args:
        help: Help text.
        type: Function that converts the text to the value. It raises :class:`argparse.ArgumentTypeError`.
        default: Value without the flag. None means that it depends on other arguments. It is filled in before the field
            is used, so the annotation does not mention None.
        **of_flag: Arguments of :meth:`argparse.ArgumentParser.add_argument`.
    """
    described = {"help": help, "type": type, "default": default, **of_flag}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=described)
    return field(default=default, metadata=described)


def flag(help: str) -> Any:
    """A field that is False unless its flag is given."""
    return field(default=False, metadata={"help": help, "default": False, "action": "store_true"})


def add_flags(to: Any, group: Any) -> None:
    """Add the flags of a dataclass.

    Args:
        to: Parser or argument group.
        group: Dataclass with the fields.
    """
    for each in fields(group):
        if each.metadata:
            to.add_argument(f"--{each.name}", **each.metadata)


def fraction_or_number(text: str) -> float | int:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def steps_or_epoch(text: str) -> int | str:
    return text if text == "epoch" else at_least(1)(text)


def share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def not_negative(text: str) -> float:
    if (value := finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return whole_number
