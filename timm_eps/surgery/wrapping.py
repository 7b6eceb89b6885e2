"""Stock wrappers around a network: what they save does not say which branches are removed, so they may not save it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..gate import EpsilonGate

__all__ = ["guard_saving", "recorded"]

_WRAPPER = "timm_model."  # the name by which transformers' wrappers hold a network of timm's


def guard_saving(body: nn.Module) -> None:
    """Let a network refuse to give its weights to a stock wrapper once branches of it are closed or removed.

    Args:
        body: A timm model with gates.
    """
    if _refuse_stock_wrapper not in body._state_dict_pre_hooks.values():
        body.register_state_dict_pre_hook(_refuse_stock_wrapper)


@contextmanager
def recorded(body: Any) -> Iterator[None]:
    """While it lasts, a wrapper that writes the structure of a network itself may take its weights."""
    body.is_recorded = True
    try:
        yield
    finally:
        del body.is_recorded


def _refuse_stock_wrapper(body: Any, prefix: str, keep_vars: bool) -> None:
    if not prefix.endswith(_WRAPPER) or getattr(body, "is_recorded", False):
        return
    closed = any(isinstance(module, EpsilonGate) and module.closed for module in body.modules())
    if closed or getattr(body, "removed", None):
        raise ValueError(
            "A stock wrapper saves this network without saying which of its branches are closed or removed; "
            "EpsResNetForImageClassification.from_timm(wrapper) makes a model of it that says so."
        )
