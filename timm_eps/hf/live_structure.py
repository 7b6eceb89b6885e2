"""Lets the configuration of a backbone say what its network is now, whoever pruned it.

The ``save_pretrained`` of a detector or segmenter writes the configuration first and knows nothing about gates. A gate
that closes, or a branch that is removed from the timm model inside, does not tell the configuration. So the
configuration asks the network when it is written.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import nn

from ..surgery.removal import structure_of

__all__ = ["LiveStructure"]


class LiveStructure:
    """Refers to the networks that were built from a configuration, without keeping them alive.

    A copy refers to nothing, so that a copied configuration keeps the structure that it has. All are equal, so that
    configurations compare by what they say.
    """

    def __init__(self) -> None:
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def add(self, model: nn.Module) -> None:
        """Refer to one more transformers model around a network."""
        self._models.add(model)

    def read(self) -> dict[str, list[str]] | None:
        """The slots of removed branches and of closed gates; None without a network.

        Raises:
            ValueError: Two networks share the configuration and have lost different branches.
        """
        found = self._found()
        if len(found) > 1:
            gc.collect()  # a network that nobody uses any more may still be there
            found = self._found()
        if len(found) > 1:
            raise ValueError(
                "Two models share one EpsResNetConfig, and their backbones have other branches closed or removed. Give "
                "each model a configuration of its own: backbone_config=copy.deepcopy(config)."
            )
        return found[0] if found else None

    def _found(self) -> list[dict[str, list[str]]]:
        structures: list[dict[str, list[str]]] = []
        for model in self._models:
            if (structure := structure_of(model)) not in structures:
                structures.append(structure)
        return structures

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveStructure:
        return LiveStructure()

    def __reduce__(self) -> tuple[Any, ...]:
        return LiveStructure, ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LiveStructure)

    __hash__ = None  # type: ignore[assignment]
