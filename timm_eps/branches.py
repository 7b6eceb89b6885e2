"""Where the residual branches of a model are.

A branch is named by its *slot*: the module path of the stochastic-depth position that closes it, such as
``stages.1.blocks.4.drop_path``. timm puts that slot right before the addition in nearly every residual block, so a
gate set there needs no change to the block's ``forward``. An attribute's name promises nothing, though: each
candidate is probed with a forward pass before it counts as a branch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from .gate import EpsilonGate

__all__ = ["block_path", "branch_ends", "evaluating", "find_slots", "gates", "input_size", "probe_batch", "timm_body"]

_SLOT = re.compile(r"drop_path\d*")


def timm_body(model: nn.Module) -> nn.Module:
    """The timm model itself, also when a transformers class holds it as ``timm_model``.

    Raises:
        ValueError: ``model`` is wrapped for distributed training or compiled (changing modules behind such a wrapper
            leaves it with buckets or graphs of the old structure), or is no timm model.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"Got a model wrapped in {type(model).__name__}; pass the model itself (wrapper.module, or "
            "accelerator.unwrap_model(wrapper)) and wrap it again after blocks were removed."
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "Got a compiled model; pass the model itself (the argument of torch.compile, or model._orig_mod). "
            "The compiled one follows its changes, compiling anew; torch.compiler.reset() keeps it under torch's limit."
        )
    body = getattr(model, "timm_model", model)
    if not hasattr(body, "forward_features"):
        raise ValueError(
            f"{type(body).__name__} is no timm model; pass the one inside it, not features_only and not a container."
        )
    return body


def gates(model: nn.Module) -> dict[str, EpsilonGate]:
    """All gates of a model by slot path, in the order of the forward pass as the modules are registered."""
    return {path: module for path, module in timm_body(model).named_modules() if isinstance(module, EpsilonGate)}


def block_path(slot: str) -> str:
    """Path of the block that a slot belongs to."""
    return slot.rpartition(".")[0]


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Shape (C, H, W) of the images a timm model is configured for."""
    channels, height, width = get_model_input_config(model)["input_size"]
    return channels, height, width


def probe_batch(body: nn.Module, batch_size: int = 2) -> Tensor:
    """Normally distributed images (B, C, H, W) of the model's input size, device and dtype, always the same ones.

    They come from a generator of their own: probing during a run must not shift the run's random numbers.
    """
    parameter = next(body.parameters())
    shape = (batch_size, *input_size(body))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def branch_ends(body: nn.Module) -> list[nn.Module]:
    """The modules whose output is what a gate receives: the last convolution, norm or scale of each branch."""
    producers: dict[int, list[nn.Module]] = {}
    outputs: list[Tensor] = []  # kept alive, so that no two of them share an id
    ends: list[nn.Module] = []

    def produced(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)
            producers.setdefault(id(output), []).append(module)

    def arrived(gate: nn.Module, args: tuple) -> None:
        ends.extend(producers.get(id(args[0]), []))

    hooks = [
        module.register_forward_pre_hook(arrived)
        if isinstance(module, EpsilonGate)
        else module.register_forward_hook(produced)
        for module in body.modules()
    ]
    try:
        with evaluating(body):
            body(probe_batch(body))
    finally:
        for hook in hooks:
            hook.remove()
    return ends


class _Recorder(nn.Module):
    """Stands in a slot during a probe: notes what arrives, and passes on that or zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []
        self.shut = False

    def forward(self, x: Tensor) -> Tensor:
        # A copy: some blocks add the shortcut to what comes out of the slot in place.
        self.seen.append(x.clone() if isinstance(x, Tensor) else x)
        return torch.zeros_like(x) if self.shut else x


def find_slots(body: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Find the slots that carry a residual branch with a shortcut beside it.

    Args:
        body: A timm model. It is unchanged afterwards.

    Returns:
        The slot paths that passed the probe, and for each candidate that did not the reason why.
    """
    candidates = [
        (path, block, name)
        for path, block in body.named_modules()
        if not isinstance(block, EpsilonGate)
        for name in [*block._modules, *(key for key, value in vars(block).items() if value is None)]
        if _SLOT.fullmatch(name) and not isinstance(getattr(block, name), EpsilonGate)
    ]
    recorders = {(block, name): _Recorder() for _, block, name in candidates}
    originals = [getattr(block, name) for _, block, name in candidates]
    calls: dict[nn.Module, list[tuple[tuple, dict]]] = {}
    hooks = []
    accepted: list[str] = []
    refused: dict[str, str] = {}
    try:
        for _, block, name in candidates:
            setattr(block, name, recorders[block, name])
        for block in {block for _, block, _ in candidates}:
            hooks.append(
                block.register_forward_pre_hook(
                    lambda module, args, kwargs: calls.setdefault(module, []).append((args, kwargs)), with_kwargs=True
                )
            )
        with evaluating(body):
            body(probe_batch(body))
            for hook in hooks:
                hook.remove()
            arrived = {recorder: list(recorder.seen) for recorder in recorders.values()}
            for path, block, name in candidates:
                slot = f"{path}.{name}"
                recorder = recorders[block, name]
                reason = _reason_against(block, recorder, arrived[recorder], calls.get(block, []))
                if reason:
                    refused[slot] = reason
                else:
                    accepted.append(slot)
    finally:
        for hook in hooks:
            hook.remove()
        for (_, block, name), original in zip(candidates, originals, strict=True):
            setattr(block, name, original)
    return accepted, refused


def _reason_against(
    block: nn.Module, recorder: _Recorder, seen: list[object], calls: list[tuple[tuple, dict]]
) -> str | None:
    """Why a recorded slot is no gateable residual branch; None if it is one."""
    if len(seen) != 1 or len(calls) != 1:
        return f"it runs {len(seen)} times in a forward pass, and only a slot that runs once has one response"
    args, kwargs = calls[0]
    if not (isinstance(seen[0], Tensor) and args and isinstance(args[0], Tensor)):
        return "it does not carry one tensor through a block that takes one"
    x, rest = args[0], args[1:]
    if seen[0].shape == x.shape and torch.equal(seen[0], x):
        return "it acts on the block's input, not on a residual branch"
    recorder.shut = True
    try:
        here, elsewhere = block(x, *rest, **kwargs), block(x.flip(0) + 1, *rest, **kwargs)
    finally:
        recorder.shut = False
    if not isinstance(here, Tensor):
        return "its block does not return one tensor"
    if torch.equal(here, elsewhere):
        return "no shortcut stands beside it: shut, the signal would end here"
    return None
