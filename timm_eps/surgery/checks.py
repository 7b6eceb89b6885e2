"""Checks before a training: warnings about anything that would keep branches from closing or becoming empty."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from .branches import evaluating, gates, probe_batch, timm_body
from .optimizers import decays
from .parameters import bounding_parameters
from .sharding import gathered

__all__ = [
    "is_zero_scale",
    "silent_branches",
    "warn_of_evaluation",
    "warn_of_frozen",
    "warn_of_silent",
    "warn_of_undecayed",
]

_logger = logging.getLogger(__name__)


def silent_branches(body: nn.Module) -> list[str]:
    """The slots of open gates whose branches output zero, because a scale in them is zero.

    timm initialises the last norm scale, gain or layer of many branches with zero.
    """
    if not any(is_zero_scale(name, parameter) for name, parameter in body.named_parameters()):
        return []
    silent: list[str] = []
    hooks = [
        gate.register_forward_pre_hook(lambda _, args, slot=slot: None if args[0].any() else silent.append(slot))
        for slot, gate in gates(body).items()
        if not gate.closed
    ]
    with evaluating(body):
        body(probe_batch(body, 1))
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(silent))


def is_zero_scale(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a scale, or the weights of a layer, and entirely zero."""
    kinds = ("weight", "gain", "gamma", "scale", "skipinit")
    return not parameter.is_meta and name.rpartition(".")[2].startswith(kinds) and not parameter.any()


def warn_of_frozen(staying: list[str], total: int, to_go: int) -> None:
    """Warn if a budget cannot be reached because branches are frozen.

    Args:
        staying: Slots of the frozen branches.
        total: Number of branches of the unpruned network.
        to_go: Number of branches to remove.
    """
    free = total - len(staying)
    if staying and to_go > free:
        _logger.warning(
            "%d of the %d branches are frozen and stay, because none of their parameters needs a gradient (%s): at "
            "most %d branches can be removed, but %d must be. Unfreeze some, raise keep, or pass prune_frozen=True.",
            len(staying),
            total,
            shortened(staying),
            free,
            to_go,
        )


def shortened(names: Iterable[str], shown: int = 3) -> str:
    """The first of some names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def warn_of_evaluation() -> None:
    """Warn that no branch saw a batch in training mode in an epoch in which responses are measured."""
    _logger.warning(
        "No branch saw a batch in training mode before this step(), so no branch can close. Call model.train() before "
        "the training batches, and model.eval() only to evaluate."
    )


def warn_of_silent(model: nn.Module) -> None:
    """Warn about branches that start at zero, because ε follows their responses."""
    whole = gathered(model, on_main=True)
    if whole is None:  # another process of a sharded model warns
        return
    body = timm_body(whole)
    if silent := silent_branches(body):
        _logger.warning(
            "%d of %d branches of %s output zero, because their last scale is zero: %s. A budget treats them as empty, "
            "and a constant ε closes them before they have learnt anything. Use the eps_* twin of the architecture, "
            "whose scales start at one, build the model with zero_init_last=False (or similar), or load pretrained "
            "weights before creating the pruner.",
            len(silent),
            len(gates(body)),
            type(body).__name__,
            shortened(silent),
        )


def warn_of_undecayed(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Warn about optimizers that do not decay the parameters that bound the branches' responses."""
    decayed = decays(optimizers)
    bounding = bounding_parameters(model)
    ends = [name for name, p in model.named_parameters() if p in bounding and p.requires_grad and p in decayed]
    parameters = dict(model.named_parameters())
    spared = [name for name in ends if not decayed[parameters[name]]]
    if decayed and not any(decayed.values()):
        _logger.warning(
            "weight_decay is 0 in the optimizer, so closed branches do not become empty. Give the optimizer "
            "timm_eps.param_groups(model, weight_decay=...)."
        )
    elif spared:
        _logger.warning(
            "The optimizer does not decay %d of the %d parameters that bound the branches' responses (%s): closed "
            "branches do not become empty. Give the optimizer timm_eps.param_groups(model, weight_decay=...), which "
            "decays these parameters, but no other norms, scales or biases.",
            len(spared),
            len(ends),
            shortened(spared),
        )
