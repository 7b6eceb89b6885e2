"""Stock wrappers around a network: what they save does not say which branches are removed, so they may not save it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..gate import EpsilonGate

__all__ = ["guard_saving", "recorded"]

_WRAPPER = "timm_model."  # the name by which transformers' wrappers hold a network of timm's
_TRANSFORMERS = "transformers."


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
    if getattr(body, "is_recorded", False):
        return
    closed = any(isinstance(module, EpsilonGate) and module.closed for module in body.modules())
    if not closed and not getattr(body, "removed", None):
        return
    if prefix.endswith(_WRAPPER):
        raise ValueError(
            "A stock wrapper saves this network without saying which of its branches are closed or removed; "
            "EpsResNetForImageClassification.from_timm(wrapper) makes a model of it that says so."
        )
    if prefix and (owner := _transformers_model_around()):
        raise ValueError(
            f"{owner} saves its timm backbone ({prefix.removesuffix('.')}) without saying which of its branches are "
            "closed or removed. Build it with a backbone that says so: "
            "backbone_config=timm_eps.EpsResNetConfig(architecture='eps_...', out_indices=[...])."
        )


def _transformers_model_around() -> str | None:
    """The class name of the transformers model whose ``state_dict`` is being collected; None if it is none of theirs.

    torch tells a module nothing but its prefix. The modules around it are those whose ``state_dict`` is running.
    """
    frame = inspect.currentframe()
    outermost = None
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name == "state_dict" else None
        if isinstance(module, nn.Module) and any(k.__module__.startswith(_TRANSFORMERS) for k in type(module).__mro__):
            outermost = type(module).__name__
        frame = frame.f_back
    return outermost
