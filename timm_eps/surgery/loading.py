"""When weights are loaded into a model that trains, remove the branches that the weights lack.

accelerate, Lightning and Trainer load the weights of a checkpoint before the states of other objects. The smaller
structure is found from the names of the weights, and applied to the model before torch compares the names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from .branches import gates
from .removal import removed_slots, replay_removed, slots_without_weights
from .tracing import meta_copy

__all__ = ["LoadedStructure", "keys_of", "lost_since"]


class LoadedStructure:
    """A hook before ``load_state_dict`` that removes the branches that the weights lack.

    It acts only if the weights are complete otherwise. Weights of a part of the network, or of another network, are
    left to torch, which rejects or reports them. In copies and pickles of the model the hook does nothing.

    Args:
        model: A timm model, or a transformers model around one. Only a weak reference is kept, also
            to the owner of ``lose``.
        lose: Bound method that is called with the model and the missing slots whenever weights are loaded.
    """

    def __init__(self, model: nn.Module | None = None, lose: Callable[[Any, list[str]], None] | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._lose = None if lose is None else weakref.WeakMethod(lose)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def install(self, body: nn.Module) -> None:
        """Install the hook on the timm model, for the lifetime of the owner of ``lose``."""
        handle = body.register_load_state_dict_pre_hook(self)
        if self._lose is not None and (lose := self._lose()) is not None:
            weakref.finalize(lose.__self__, handle.remove)  # type: ignore[attr-defined]

    def __call__(self, body: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        model = None if self._model is None else self._model()
        lose = None if self._lose is None else self._lose()
        if model is not None and lose is not None:
            lose(model, _lacking(body, keys_of(state_dict, prefix)))


def keys_of(state_dict: Iterable[str], prefix: str) -> set[str]:
    """The keys of a module in the state dict of an outer model."""
    return {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}


def _lacking(body: nn.Module, keys: Collection[str]) -> list[str]:
    """The slots whose removal leaves a network with exactly these keys; empty if this is impossible."""
    slots = slots_without_weights(body, keys)
    if not slots:
        return []
    net = meta_copy(body)
    try:
        replay_removed(net, slots)
    except ValueError:
        return []
    left, own = (_weights_of(names) for names in (net.state_dict(), body.state_dict()))
    return slots if left == own & set(keys) else []


def _weights_of(names: Iterable[str]) -> set[str]:
    """The names without the ``closed`` entries of gates."""
    return {name for name in names if not name.endswith(".closed")}


_STATE = {"epoch", "epsilon", "removed", "streaks", "closed", "responses", "importances", "history"}


def lost_since(model: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """The slots of branches that are missing in a pruner's state but not in the model.

    Args:
        model: The model with gates.
        state: Result of :meth:`timm_eps.EpsilonPruner.state_dict`.

    Raises:
        ValueError: It is not such a state, it belongs to another architecture, or the model lacks branches that it
            contains.
    """
    if missing := _STATE - state.keys():
        raise ValueError(f"Not the state of an EpsilonPruner: it lacks {sorted(missing)}.")
    already, removed = set(removed_slots(model)), set(state["removed"])
    if lost := already - removed:
        raise ValueError(f"Branch {min(lost)!r} is removed from the model, but the pruner's state still has it.")
    if strangers := (gates(model).keys() | already) ^ (state["streaks"].keys() | removed):
        raise ValueError(f"The pruner's state belongs to another model: they differ at {min(strangers)!r}.")
    return removed - already
