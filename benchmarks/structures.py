"""Simple rules that choose branches."""

from __future__ import annotations

from collections.abc import Sequence


def evenly(slots: Sequence[str], keep: int) -> list[str]:
    """The slots to remove so that ``keep`` slots stay, at equal distances."""
    kept = {round((index + 0.5) * len(slots) / keep - 0.5) for index in range(keep)}
    return [slot for index, slot in enumerate(slots) if index not in kept]
