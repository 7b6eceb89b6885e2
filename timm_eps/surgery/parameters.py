"""Parameters that need weight decay, so that a closed branch becomes empty."""

from __future__ import annotations

from typing import Any

from torch import nn

from .branches import branch_ends, gates, timm_body
from .removal import check_gated

__all__ = ["bounding_parameters", "param_groups"]


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups under which weight decay can empty a closed branch.

    The weights of convolutions and linear layers are decayed. If a branch ends in a norm or a layer scale, the
    parameters of this norm or scale are decayed too, because they alone bound the output. No other bias, norm or scale
    is decayed.

    Args:
        model: A model with gates.
        weight_decay: L2 coefficient of the decayed group.

    Returns:
        Two groups, decayed and not, for any ``torch.optim`` optimizer. Parameters that need no gradient are left out.

    Raises:
        ValueError: ``weight_decay`` is negative or NaN, or the model has no gates.

    Example::

        optimizer = torch.optim.SGD(timm_eps.param_groups(model, weight_decay=5e-3), lr=0.1, momentum=0.9)
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}.")
    check_gated(model)
    bounding = bounding_parameters(model)
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 or parameter in bounding else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def bounding_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The last parameters of each branch (of a convolution, norm or scale), which bound its response."""
    body = timm_body(model)
    ends = [module for modules in branch_ends(body).values() for module in modules]
    # A layer scale is a module at the end of the branch, or a parameter of the block.
    ends += [body.get_submodule(slot.rpartition(".")[0]) for slot in gates(body)]
    return {parameter for end in ends for parameter in end.parameters(recurse=False)}
