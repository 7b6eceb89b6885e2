"""Where the residual branches of a model are.

A branch is named by its *slot*: the module path of the stochastic-depth position that closes it, such as
``stages.1.blocks.4.drop_path``. timm puts that slot right before the addition in nearly every residual block, so a
gate set there needs no change to the block's ``forward``. An attribute's name promises nothing, though: each
candidate is probed with a forward pass before it counts as a branch.
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

from ..gate import EpsilonGate
from .feature_nets import is_taken_apart, network_in
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

# Why a slot got no gate, where nobody would expect one: a block without a shortcut has it for nothing.
UNUSED = "it does not run in a forward pass"

_SLOT = re.compile(r"(\w+_)?drop_path\d*")


def timm_body(model: nn.Module) -> nn.Module:
    """The timm model itself, also in a transformers class or in the wrapper that ``features_only=True`` makes.

    Args:
        model: A timm model, or a transformers model around one.

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
    body = network_in(model)
    if not _is_timm_model(body):
        raise ValueError(f"{type(body).__name__} is no timm model; {_remedy(model)}.")
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
    return f"pass the one inside it, {' or '.join(f'model.{path}' for path in apart[:3])}"


def _is_timm_model(module: nn.Module) -> bool:
    """Whether a module is a network of timm's, or of a class that is registered with timm or inherits from its own."""
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
    """Path of the block that a slot belongs to: the module around it, or around the sequence that it ends."""
    path = slot.rpartition(".")[0]
    while type(body.get_submodule(path)) in (nn.Sequential, nn.ModuleList):
        path = path.rpartition(".")[0]
    return path


# How timm names blocks within stages; what a block consists of may have numbers of its own.
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
    """Shape (C, H, W) of the images a timm model is configured for, or can only take."""
    channels, height, width = get_model_input_config(model)["input_size"]
    height, width = getattr(model, "only_img_size", None) or (height, width)
    return channels, height, width


def probe_batch(body: nn.Module, batch_size: int = 2) -> Tensor:
    """Normally distributed images (B, C, H, W) of the model's input size, device and dtype, always the same ones.

    They come from a generator of their own: probing during a run must not shift the run's random numbers.
    """
    parameter = next(body.parameters())
    shape = (batch_size, *input_size(body))
    if parameter.device.type == "meta":
        # Five images cost nothing here, and no code takes them for a pair, or for a number of channels.
        return torch.empty((5, *shape[1:]), device="meta", dtype=parameter.dtype)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)


def check_input(body: nn.Module) -> None:
    """Raise ValueError if a model does not take the images that it is configured for, by which it would be probed."""
    net = meta_copy(body)
    images = probe_batch(net)
    try:
        with torch.no_grad():
            net(images)
    except Exception as error:  # whatever a model's own code raises over a shape
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(body).__name__} does not take images of {tuple(images.shape[1:])}, as its configuration says "
            f"({reason[:60]}). Build it with in_chans= or img_size=, as in timm.create_model(name, in_chans=1), which "
            "adapts pretrained weights; do not replace layers by hand."
        ) from error


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


def branch_ends(body: nn.Module) -> dict[str, list[nn.Module]]:
    """For each gate the modules whose output it receives: the last convolution, norm or scale of its branch."""
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
    """The parameters, by name, on which the output depends only through the branches of these slots."""
    net = meta_copy(body)
    own = dict(net.named_parameters())
    dense, shut = traces_open_and_shut(net, probe_batch(net), slots)
    lost = dense.live - shut.live
    return {name: parameter for name, parameter in body.named_parameters() if id(own[name]) in lost}


def traces_open_and_shut(net: nn.Module, batch: Tensor, slots: Iterable[str]) -> tuple[Trace, Trace]:
    """Traces of a meta copy with all its gates open, and with those of some slots shut, which they are then."""
    found = gates(net)
    for gate in found.values():
        gate.closed = False
    dense = trace(net, batch)
    for slot in slots:
        found[slot].closed = True
    return dense, trace(net, batch)


class _Probe(nn.Module):
    """Stands in a slot of a meta copy: notes what arrives, and passes on that, zeros, or a single zero."""

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


@torch.inference_mode(mode=False)  # a graph is needed, whatever the caller does without
@torch.enable_grad()
def find_slots(body: nn.Module) -> tuple[dict[str, bool], dict[str, str]]:
    """Find the slots that carry a residual branch with a shortcut beside it.

    What is probed is the graph of a forward pass on the meta device, so the answer depends on the architecture alone.

    Args:
        body: A timm model. It is not touched.

    Returns:
        For each slot that passed the probe whether its block can add a single zero, and for each that did not the
        reason why.
    """
    net = meta_copy(body)
    probes: dict[str, _Probe] = {}
    for path, owner in list(net.named_modules()):
        if isinstance(owner, EpsilonGate):
            continue
        for name in [*owner._modules, *(key for key, value in vars(owner).items() if value is None)]:
            if _SLOT.fullmatch(name) and not isinstance(getattr(owner, name), EpsilonGate):
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
    """Why a slot is no gateable residual branch; None if it is one in every call of its block."""
    for call in calls:
        (args, kwargs), inputs = fresh((call.args, call.kwargs))
        probe.seen.clear()
        trace(call.module, *args, **kwargs)
        if not all(isinstance(x, Tensor) and x.is_floating_point() for x in probe.seen):
            return "it carries something else than one tensor"
        if any(leads_to(x) <= inputs for x in probe.seen):
            return "it acts on the block's input, not on a residual branch"
        with probe.answering(torch.zeros_like):
            outputs = tensors(trace(call.module, *args, **kwargs).output)
        if not all(leads_to(output) & inputs for output in outputs):
            return "no shortcut stands beside it: shut, the signal would end here"
    return None


def _takes_single_zero(probe: _Probe, calls: list[Call]) -> bool:
    """Whether a block broadcasts what comes out of a slot, instead of adding to it in place or slicing it."""
    try:
        with torch.no_grad(), probe.answering(lambda x: x.new_zeros(())):
            return all(shapes(call.module(*call.args, **call.kwargs)) == shapes(call.output) for call in calls)
    except Exception:  # whatever the block's own code, or its torch, raises: torch.stack asserted before 2.10
        return False
