"""Output of a verb: text for people, or one JSON object for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from ..analysis.report import finite_values

__all__ = ["UsageError", "add_json", "answer", "saved_percent", "size_text", "table"]


class UsageError(Exception):
    """Flags that exclude each other. The command ends with exit code 2, like argparse."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def answer(args: argparse.Namespace, found: dict[str, Any], text: str) -> None:
    """Print the result of a verb: as JSON with ``--json``, otherwise as text.

    Args:
        args: Arguments of the verb.
        found: The JSON object. A number that is not finite becomes null.
        text: The text, without a line break at the end.
    """
    print(json.dumps(finite_values(found), allow_nan=False) if args.json else text, file=args.out, flush=True)


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column is aligned left, the others right."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def saved_percent(before: float, after: float) -> float:
    """Reduction from ``before`` to ``after``, in per cent of ``before``."""
    return 100 * (1 - after / before) if before else 0.0


def size_text(size: int) -> str:
    """A number of bytes as text: ``1,234 bytes`` or ``5.6 MB`` (a million bytes)."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size:,} bytes"
