"""Keep track of the deep copies of a network, such as an average of its weights."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

__all__ = ["Copies", "note_copies"]


class Copies:
    """The living deep copies of a network, and the ones already mentioned in a warning.

    This object is an attribute of the network, so ``copy.deepcopy`` calls it. A copy tracks its own copies. A pickled
    network is not a copy.

    Args:
        body: The network.
    """

    def __init__(self, body: nn.Module | None = None) -> None:
        self._body = None if body is None else weakref.ref(body)
        self.alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.named: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Copies:
        # copy.deepcopy creates the new object, and stores it here, before it copies the attributes.
        copied = None if self._body is None else memo.get(id(self._body()))
        if not isinstance(copied, nn.Module):
            return Copies()
        self.alive.add(copied)
        return Copies(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, ()

    def is_of(self, body: nn.Module) -> bool:
        """Whether it was made for this network."""
        return self._body is not None and self._body() is body


def note_copies(body: Any) -> Copies:
    """Start or continue to keep track of the deep copies of a network."""
    noted = getattr(body, "_eps_copies", None)
    if not (isinstance(noted, Copies) and noted.is_of(body)):
        noted = body._eps_copies = Copies(body)
    return noted
