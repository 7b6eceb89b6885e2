"""Which branches simple rules keep, and how branches are taken out of a trained network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

import timm_eps
from timm_eps.branches import gates


def evenly(slots: Sequence[str], keep: int) -> list[str]:
    """What to remove so that ``keep`` of the slots stay, at equal distances."""
    kept = {round((index + 0.5) * len(slots) / keep - 0.5) for index in range(keep)}
    return [slot for index, slot in enumerate(slots) if index not in kept]


def cut(model: nn.Module, slots: Iterable[str]) -> None:
    """Take branches out of a trained network, whatever they compute."""
    for slot in slots:
        gates(model)[slot].closed = True
    timm_eps.remove_closed(model)
