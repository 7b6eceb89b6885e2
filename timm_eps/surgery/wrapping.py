"""Stock transformers wrappers do not save which branches are removed, so saving a pruned network in one is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..gate import EpsilonGate

__all__ = ["guard_features", "guard_saving", "recorded"]

_WRAPPER = "timm_model."  # attribute in which transformers' wrappers hold the timm model


def guard_saving(body: nn.Module) -> None:
    """Make a network with closed or removed branches raise an error when a stock wrapper saves it.

    Args:
        body: A timm model with gates.
    """
    if _refuse_stock_wrapper not in body._state_dict_pre_hooks.values():
        body.register_state_dict_pre_hook(_refuse_stock_wrapper)


@contextmanager
def recorded(body: Any) -> Iterator[None]:
    """Allow a wrapper that saves the structure of a network to read its weights."""
    body.is_recorded = True
    try:
        yield
    finally:
        del body.is_recorded


def _refuse_stock_wrapper(body: Any, prefix: str, keep_vars: bool) -> None:
    if prefix.endswith(_WRAPPER) and not getattr(body, "is_recorded", False) and _has_lost_branches(body):
        raise ValueError(
            "A stock wrapper does not save which branches of this network are closed or removed. Use "
            "EpsResNetForImageClassification.from_timm(wrapper), which saves this."
        )


def guard_features(wrapper: nn.Module) -> None:
    """Make a stock network for features raise an error when a larger model saves it with closed or removed branches.

    Args:
        wrapper: Network that timm made with ``features_only=True``, not by the name of a twin.
    """
    if _refuse_stock_features not in wrapper._state_dict_pre_hooks.values():
        wrapper.register_state_dict_pre_hook(_refuse_stock_features)


def _refuse_stock_features(wrapper: nn.Module, prefix: str, keep_vars: bool) -> None:
    if prefix and any(_has_lost_branches(module) for module in wrapper.modules()):
        raise ValueError(
            "The model around this feature network does not save which of its branches are closed or removed. In a "
            "detector or segmenter of transformers, use backbone_config=timm_eps.EpsResNetConfig(architecture="
            "'eps_...', out_indices=[...]); in your own model, timm.create_model('eps_...', features_only=True)."
        )


def _has_lost_branches(module: Any) -> bool:
    closed = any(isinstance(part, EpsilonGate) and part.closed for part in module.modules())
    return closed or bool(getattr(module, "removed", None))
