"""Simple rules that choose branches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from timm_eps.importance import shares
from timm_eps.surgery.branches import stage_of


def evenly(slots: Sequence[str], keep: int) -> list[str]:
    """The slots to remove so that ``keep`` slots stay, at equal distances."""
    kept = {round((index + 0.5) * len(slots) / keep - 0.5) for index in range(keep)}
    return [slot for index, slot in enumerate(slots) if index not in kept]


def stage_by_stage(ranks: Mapping[str, float], keep: int) -> list[str]:
    """The slots to remove so that ``keep`` stay and each stage keeps its share. In a stage, low ranks go first."""
    counts = Counter(map(stage_of, ranks))
    places = shares(counts, keep, dict.fromkeys(counts, int(keep >= len(counts))))
    removed = []
    for stage in counts:
        there = sorted((slot for slot in ranks if stage_of(slot) == stage), key=ranks.__getitem__)
        removed += there[: len(there) - places[stage]]
    return removed
