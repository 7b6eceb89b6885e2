"""Side supervision: a second classifier that reads the network at half depth while it trains (paper, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, ClassifierHead
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.eps_resnet import EpsResNet
from ..surgery.branches import block_path, gates, probe_batch
from ..surgery.removal import natural_order, removed_slots
from ..surgery.tracing import meta_copy

__all__ = ["Tap", "half_depth", "new_side_head"]


def half_depth(body: nn.Module) -> str:
    """Path of the block whose output the side head reads, after half of the residual branches.

    In the CIFAR networks this is block n // 2 of the middle stage, in others the last block of the first half, as in
    the authors' scripts for CIFAR and for ImageNet.
    """
    slots = sorted([*removed_slots(body), *gates(body)], key=natural_order)
    middle = len(slots) // 2 if isinstance(body, EpsResNet) else max(len(slots) // 2 - 1, 0)
    return block_path(body, slots[middle])


def new_side_head(body: nn.Module) -> nn.Module:
    """BN-ReLU, global average pool and a linear layer, (B, C, H, W) -> (B, classes), for the block at half depth.

    Raises:
        ValueError: The block does not output feature maps.
    """
    net: Any = meta_copy(body)
    tap = Tap(half_depth(body)).connect(net)
    with torch.no_grad():
        tap.listen()
        net(probe_batch(net))
    features = tap.take()
    if not (isinstance(features, Tensor) and features.ndim == 4):
        raise ValueError(
            f"{type(body).__name__} has no feature maps at half depth for a side head; set side_loss_weight to 0."
        )
    width = features.shape[1]
    return nn.Sequential(BatchNormAct2d(width), ClassifierHead(width, net.num_classes))


class Tap:
    """Records the output of one module of a network between :meth:`listen` and :meth:`take`.

    This is not a context manager, because torch can compile user-defined ones only from 2.13 on.

    Args:
        path: Path of the module.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._module: nn.Module | None = None
        self._output: Any = None
        self._handle: RemovableHandle | None = None
        self._listens = False

    def connect(self, net: nn.Module) -> Tap:
        """Connect to the module that is at the path now, since a removal replaces modules."""
        module = net.get_submodule(self.path)
        if module is not self._module:
            if self._handle is not None:
                self._handle.remove()  # a removal transfers hooks
            self._module = module
            self._handle = module.register_forward_hook(self._note)
        return self

    def listen(self) -> None:
        """Start recording the output of every call."""
        self._listens = True

    def take(self) -> Any:
        """Stop recording and return the output of the last call. It is not kept, because it holds a graph."""
        output, self._output, self._listens = self._output, None, False
        return output

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._listens:  # False when a checkpointed block runs again in the backward pass
            self._output = output
