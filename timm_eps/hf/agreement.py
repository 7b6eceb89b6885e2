"""Whether two models name their classes, and read their images, alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["are_placeholders", "differing_statistics"]


def are_placeholders(names: Iterable[str]) -> bool:
    """Whether class names are those that transformers gives by default: ``LABEL_0``, ``LABEL_1``, and so on."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def differing_statistics(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first of ``mean`` and ``std`` by which two descriptions normalise images differently; None if there is none.

    Args:
        theirs: timm's description of the input of one model. A statistic that it lacks does not differ.
        own: Description of the other model.
    """
    for field in ("mean", "std"):
        if theirs.get(field) is not None and not torch.allclose(
            torch.tensor(theirs[field]), torch.tensor(own[field]), atol=1e-3
        ):
            return field
    return None
