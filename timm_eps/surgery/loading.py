"""A model that trains follows the structure of weights that are loaded into it.

accelerate, Lightning and Trainer load the weights of a checkpoint before the state of whatever else was registered. The
smaller structure is read off the names of the weights, and the model takes it before torch compares the two.
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
    """A hook before ``load_state_dict`` that lets a model lose the branches which the weights lack.

    Only if the weights are whole otherwise: those of a part of the network, or of another one, are left to torch,
    which refuses or reports them. Copies of the model, and pickled ones, get a hook that does nothing.

    Args:
        model: A timm model, or a transformers model around one. It is not kept alive, nor is the owner of ``lose``.
        lose: A bound method, called with the model and the slots that the weights lack, whenever weights are loaded.
    """

    def __init__(self, model: nn.Module | None = None, lose: Callable[[Any, list[str]], None] | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._lose = None if lose is None else weakref.WeakMethod(lose)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def install(self, body: nn.Module) -> None:
        """Hook into the timm model in the model, for as long as the owner of ``lose`` lives."""
        handle = body.register_load_state_dict_pre_hook(self)
        if self._lose is not None and (lose := self._lose()) is not None:
            weakref.finalize(lose.__self__, handle.remove)  # type: ignore[attr-defined]

    def __call__(self, body: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        model = None if self._model is None else self._model()
        lose = None if self._lose is None else self._lose()
        if model is not None and lose is not None:
            lose(model, _lacking(body, keys_of(state_dict, prefix)))


def keys_of(state_dict: Iterable[str], prefix: str) -> set[str]:
    """A module's own keys in the state dict of a model around it."""
    return {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}


def _lacking(body: nn.Module, keys: Collection[str]) -> list[str]:
    """The slots without which a network has exactly those of its keys that are given; none if there are no such."""
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
    """Names without those by which gates say that they are closed."""
    return {name for name in names if not name.endswith(".closed")}


_STATE = {"epoch", "epsilon", "removed", "streaks", "closed", "responses", "importances", "history"}


def lost_since(model: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """The slots of the branches that a stored state of a pruner lacks and the model still has.

    Args:
        model: The model with gates.
        state: What :meth:`timm_eps.EpsilonPruner.state_dict` returned.

    Raises:
        ValueError: It is no such state, it belongs to another architecture, or the model lacks branches that it has.
    """
    if missing := _STATE - state.keys():
        raise ValueError(f"Not the state of an EpsilonPruner: it lacks {sorted(missing)}.")
    already, removed = set(removed_slots(model)), set(state["removed"])
    if lost := already - removed:
        raise ValueError(f"The model has already lost {min(lost)!r}, which the pruner's state still has.")
    if strangers := (gates(model).keys() | already) ^ (state["streaks"].keys() | removed):
        raise ValueError(f"The pruner's state is of another model: they differ at {min(strangers)!r}.")
    return removed - already
