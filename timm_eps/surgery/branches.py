"""Find the residual branches of a model.

A branch is identified by its *slot*: the module path of the stochastic-depth position where it ends, such as
``stages.1.blocks.4.drop_path``. In nearly every residual block of timm this slot is directly before the addition, so a
gate there needs no change to the block's ``forward``. The name of an attribute alone is not reliable, so each candidate
is checked with a forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.models import FeatureDictNet, get_model_input_config
from torch import Tensor, nn

from ..files.edits import SLOT_NAME
from ..gate import EpsilonGate
from .feature_nets import is_taken_apart, network_in
from .sharding import check_wrapper
from .tracing import Call, Trace, fresh, leads_to, meta_copy, shapes, tensors, trace

__all__ = [
    "block_path",
    "branch_ends",
    "branch_parameters",
    "check_input",
    "evaluating",
    "find_slots",
    "gates",
    "input_size",
    "probe_batch",
    "slots_by_block",
    "stage_of",
    "timm_body",
    "traces_open_and_shut",
]

# Reason given when a slot is unused, for example in a block without a shortcut. Logged at INFO: no gate is expected.
UNUSED = "it does not run in a forward pass"


def timm_body(model: nn.Module) -> nn.Module:
    """The timm model itself, also in a transformers class or in the wrapper that ``features_only=True`` makes.

    Args:
        model: A timm model, or a transformers model around one.

    Raises:
        ValueError: ``model`` is wrapped for distributed training or compiled (the wrapper would keep buckets or graphs
            of the old structure), or is not a timm model.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"Got a model wrapped in {type(model).__name__}; pass the model itself (wrapper.module, or "
            "accelerator.unwrap_model(wrapper)) and wrap it again after removing blocks."
        )
    check_wrapper(model)
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "Got a compiled model; pass the model itself (the argument of torch.compile, or model._orig_mod). "
            "The compiled model is recompiled after changes; torch.compiler.reset() resets torch's recompile limit."
        )
    body = network_in(model)
    if not _is_timm_model(body):
        raise ValueError(f"{type(body).__name__} is not a timm model; {_remedy(model)}.")
    return body


def _remedy(model: nn.Module) -> str:
    """Which module to pass instead of one that is no timm model."""
    if is_taken_apart(model):
        return (
            "timm has taken its blocks apart. Prune the classifier, and pass its removed_slots as removed= when the "
            "network is created with features_only=True"
        )
    inside = [path for path, module in model.named_modules() if path and _is_timm_model(network_in(module))]
    if not inside and hasattr(model, "feature_info"):
        return "make the gated twin, timm.create_model('eps_...', features_only=True)"
    if not inside:
        return "pass one that timm.create_model makes"
    # Modules around others come first.
    apart = [path for path in inside if not any(path.startswith(f"{around}.") for around in inside)]
    return f"pass the timm model inside it, {' or '.join(f'model.{path}' for path in apart[:3])}"


def _is_timm_model(module: nn.Module) -> bool:
    """Whether the class of a module belongs to timm, inherits from a timm class, or is registered with timm."""
    if isinstance(module, FeatureDictNet):
        return True
    if not hasattr(module, "forward_features"):
        return False
    of_timm = any(kind.__module__.startswith(("timm.models.", "timm_eps.")) for kind in type(module).__mro__)
    return of_timm or "architecture" in (getattr(module, "pretrained_cfg", None) or ())


def gates(model: nn.Module) -> dict[str, EpsilonGate]:
    """All gates of a model by slot path, in the order of the forward pass as the modules are registered.

    Example::

        widest = max(timm_eps.gates(model).items(), key=lambda named: named[1].response)

    Args:
        model: A timm model, or a transformers model around one.
    """
    return {path: module for path, module in timm_body(model).named_modules() if isinstance(module, EpsilonGate)}


def block_path(body: nn.Module, slot: str) -> str:
    """Path of the block of a slot: the module around the slot, or around the sequence that contains it."""
    path = slot.rpartition(".")[0]
    while type(body.get_submodule(path)) in (nn.Sequential, nn.ModuleList):
        path = path.rpartition(".")[0]
    return path


# timm's names of blocks within stages. Modules inside a block may have numbers, too.
_WITHIN_STAGE = (
    r"(.*?\.\d+)\.blocks\.\d",  # stages.1.blocks.4
    r"(.*?\.\d+)\.\d+\.",  # blocks.2.1, stages.3.1.transformer.0
    r"(.*)\.\d+\.(?:attns|ffns)\.",  # blocks.7.attns.1: parallel branches
    r"(.*)\.[a-z]?\d+\.",  # layer2.0, s3.b1, blocks.11
)


def stage_of(slot: str) -> str:
    """``stages.1.blocks.4.drop_path`` -> ``stages.1``, ``layer2.0.drop_path`` -> ``layer2``."""
    return next((found[1] for pattern in _WITHIN_STAGE if (found := re.match(pattern, slot))), slot)


def slots_by_block(body: nn.Module, slots: Iterable[str]) -> dict[str, list[str]]:
    """The slots of each block, by the block's path."""
    blocks: dict[str, list[str]] = {}
    for slot in slots:
        blocks.setdefault(block_path(body, slot), []).append(slot)
    return blocks


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Shape (C, H, W) of the images that a timm model is configured for, or the only shape that it accepts."""
    channels, height, width = get_model_input_config(model)["input_size"]
    height, width = getattr(model, "only_img_size", None) or (height, width)
    return channels, height, width


def probe_batch(body: nn.Module, batch_size: int = 2) -> Tensor:
    """Normally distributed images (B, C, H, W) of the model's input size, device and dtype; the same for every call.

    They come from a separate generator, so that probing does not change the random numbers of a run.
    """
    parameter = next(body.parameters())
    shape = (batch_size, *input_size(body))
    if parameter.device.type == "meta":
        # Five images cost nothing on the meta device, and cannot be mistaken for a pair or a number of channels.
        return torch.empty((5, *shape[1:]), device="meta", dtype=parameter.dtype)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)


def check_input(body: nn.Module) -> None:
    """Raise ValueError if a model does not accept images of its configured size, which probes use."""
    net = meta_copy(body)
    images = probe_batch(net)
    try:
        with torch.no_grad():
            net(images)
    except Exception as error:  # a model's code may raise any error for a wrong shape
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(body).__name__} does not accept images of {tuple(images.shape[1:])}, its configured size "
            f"({reason[:60]}). Build it with in_chans= or img_size=, as in timm.create_model(name, in_chans=1), which "
            "adapts pretrained weights; do not replace layers by hand."
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Each module's mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def branch_ends(body: nn.Module) -> dict[str, list[nn.Module]]:
    """For each gate, the modules whose output it gets: the last convolution, norm or scale of its branch."""
    net = meta_copy(body)
    original = dict(zip(net.modules(), body.modules(), strict=True))
    producers: dict[int, list[nn.Module]] = {}
    outputs: list[Tensor] = []  # kept alive, so that no two of them share an id
    ends: dict[str, list[nn.Module]] = {slot: [] for slot in gates(body)}

    def produced(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)
            producers.setdefault(id(output), []).append(module)

    def arrived(slot: str, gate: nn.Module, args: tuple) -> None:
        ends[slot].extend(original[module] for module in producers.get(id(args[0]), []))

    for module in net.modules():
        if not isinstance(module, EpsilonGate):
            module.register_forward_hook(produced)
    for slot, gate in gates(net).items():
        gate.register_forward_pre_hook(partial(arrived, slot))
    with torch.no_grad():
        net(probe_batch(net))
    return ends


@torch.inference_mode(mode=False)
@torch.enable_grad()
def branch_parameters(body: nn.Module, slots: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters by name that affect the output only through the branches in these slots."""
    net = meta_copy(body)
    own = dict(net.named_parameters())
    dense, shut = traces_open_and_shut(net, probe_batch(net), slots)
    lost = dense.live - shut.live
    return {name: parameter for name, parameter in body.named_parameters() if id(own[name]) in lost}


def traces_open_and_shut(net: nn.Module, batch: Tensor, slots: Iterable[str]) -> tuple[Trace, Trace]:
    """Traces of a meta copy with all gates open, and with the gates of some slots closed. These stay closed."""
    found = gates(net)
    for gate in found.values():
        gate.closed = False
    dense = trace(net, batch)
    for slot in slots:
        found[slot].closed = True
    return dense, trace(net, batch)


class _Probe(nn.Module):
    """Records the inputs of a slot in a meta copy, and returns the input, zeros, or a single zero."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.answer: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Any) -> Any:
        self.seen.append(x)
        return x if self.answer is None else self.answer(x)

    @contextmanager
    def answering(self, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
        self.answer = answer
        try:
            yield
        finally:
            self.answer = None


@torch.inference_mode(mode=False)  # probing needs an autograd graph
@torch.enable_grad()
def find_slots(body: nn.Module) -> tuple[dict[str, bool], dict[str, str]]:
    """Find the slots of residual branches that have a shortcut.

    The probe uses the graph of a forward pass on the meta device, so the result depends only on the architecture.

    Args:
        body: A timm model. It is not changed.

    Returns:
        For each accepted slot, whether its block can add a single zero; and for each rejected slot, the reason.
    """
    net = meta_copy(body)
    probes: dict[str, _Probe] = {}
    for path, owner in list(net.named_modules()):
        if isinstance(owner, EpsilonGate):
            continue
        for name in [*owner._modules, *(key for key, value in vars(owner).items() if value is None)]:
            if SLOT_NAME.fullmatch(name) and not isinstance(getattr(owner, name), EpsilonGate):
                probe = _Probe()
                setattr(owner, name, probe)
                probes[f"{path}.{name}"] = probe
    whole = trace(net, probe_batch(net))
    ran = {slot for slot, probe in probes.items() if probe.seen}
    accepted: dict[str, bool] = {}
    refused: dict[str, str] = {}
    for slot, probe in probes.items():
        calls = whole.calls_of(net.get_submodule(block_path(net, slot)))
        if slot not in ran:
            refused[slot] = UNUSED
        elif reason := _reason_against(probe, calls):
            refused[slot] = reason
        else:
            accepted[slot] = _takes_single_zero(probe, calls)
    return accepted, refused


def _reason_against(probe: _Probe, calls: list[Call]) -> str | None:
    """Why a slot cannot get a gate; None if it ends a residual branch in every call of its block."""
    for call in calls:
        (args, kwargs), inputs = fresh((call.args, call.kwargs))
        probe.seen.clear()
        trace(call.module, *args, **kwargs)
        if not all(isinstance(x, Tensor) and x.is_floating_point() for x in probe.seen):
            return "its input is not a single tensor"
        if any(leads_to(x) <= inputs for x in probe.seen):
            return "it gets the block's input, not the output of a residual branch"
        with probe.answering(torch.zeros_like):
            outputs = tensors(trace(call.module, *args, **kwargs).output)
        if not all(leads_to(output) & inputs for output in outputs):
            return "the block has no shortcut: with a closed gate the signal would end here"
    return None


def _takes_single_zero(probe: _Probe, calls: list[Call]) -> bool:
    """Whether a block broadcasts the output of a slot, instead of slicing it or adding to it in place."""
    try:
        with torch.no_grad(), probe.answering(lambda x: x.new_zeros(())):
            return all(shapes(call.module(*call.args, **call.kwargs)) == shapes(call.output) for call in calls)
    except Exception:  # the block's code or torch may raise any error: before 2.10 torch.stack asserted
        return False
