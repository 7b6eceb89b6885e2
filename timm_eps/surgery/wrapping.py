"""Stock transformers wrappers do not save which branches are removed, so saving a pruned network in one is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..gate import EpsilonGate

__all__ = ["guard_saving", "recorded"]

# Attributes in which transformers' classes hold a timm model: the wrapper, and TimmBackbone.
_STOCK = ("timm_model.", "_backbone.")


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
    if not prefix.endswith(_STOCK) or getattr(body, "is_recorded", False):
        return
    closed = any(isinstance(module, EpsilonGate) and module.closed for module in body.modules())
    if closed or getattr(body, "removed", None):
        raise ValueError(
            "A stock wrapper of transformers does not save which branches of this network are closed or removed. Use "
            "EpsResNetForImageClassification.from_timm(wrapper), which saves this; for a detector or segmenter, "
            "backbone_config=timm_eps.EpsResNetConfig(architecture='eps_...', out_indices=[...])."
        )
