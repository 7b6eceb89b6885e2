"""Networks that timm made with ``features_only=True``, and the names of the slots in them.

timm wraps a network in one of four classes. Two hold it whole. One lists its modules as its own, and may join the
first two parts of their names: ``stages.0`` becomes ``stages_0``. The fourth is a graph, which has no blocks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from timm.models import FeatureDictNet, FeatureGraphNet, FeatureHookNet
from torch import nn

from .wrapping import guard_saving

__all__ = ["features_without", "is_stock_features", "is_taken_apart", "network_in", "spelled_as"]


def network_in(model: nn.Module) -> Any:
    """The network in a transformers class or in timm's wrapper for features; any other module is returned as it is.

    A wrapper that lists the modules of a network as its own is the network.
    """
    if _is_getter(model):
        return model["model"]  # type: ignore[index]
    if isinstance(model, FeatureHookNet) and "body" in model:
        return model["body"]
    return getattr(model, "timm_model", model)


def is_taken_apart(model: nn.Module) -> bool:
    """Whether a module gives features of a network whose blocks are no modules that could be replaced."""
    return isinstance(model, FeatureHookNet | FeatureGraphNet)


def spelled_as(slots: Iterable[str], known: Container[str], dotted: Iterable[str]) -> list[str]:
    """Slots of a network for features by the names that they have in the network itself.

    Args:
        slots: Slot paths, such as ``stages_0.blocks.1.drop_path``.
        known: Paths that need no change.
        dotted: All slot paths of the network itself.
    """
    joined = {path.replace(".", "_", 1): path for path in dotted}
    return [slot if slot in known else joined.get(slot, slot) for slot in slots]


def is_stock_features(model: nn.Module) -> bool:
    """Whether timm made a network with ``features_only=True``, and not by the name of a twin."""
    is_wrapper = isinstance(model, FeatureDictNet | FeatureHookNet) or _is_getter(model)
    return is_wrapper and not getattr(model, "is_twin", False)


def _is_getter(model: nn.Module) -> bool:
    return isinstance(model, nn.ModuleDict) and type(model).__name__ == "FeatureGetterNet"  # timm does not export it


def features_without(model: nn.Module, removed: Iterable[str]) -> nn.Module:
    """Note in a wrapper which branches its network lacks, under the names that they would have in the wrapper.

    Args:
        model: The network, or the wrapper around it, that timm made. Only one that lists modules as its own is changed.
        removed: Slot paths of the network itself.
    """
    model.is_twin = True  # type: ignore[assignment]
    if isinstance(model, FeatureDictNet):
        spelled = [slot if slot.partition(".")[0] in model else slot.replace(".", "_", 1) for slot in removed]
        model.removed = [slot for slot in spelled if slot.partition(".")[0] in model]  # type: ignore[assignment]
        guard_saving(model)
    return model
