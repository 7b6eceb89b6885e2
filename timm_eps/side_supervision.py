"""Side supervision: a second classifier that reads the network at half depth while it trains (paper, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, ClassifierHead
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .branches import block_path, gates, probe_batch
from .eps_resnet import EpsResNet
from .surgery import natural_order, removed_slots
from .tracing import meta_copy

__all__ = ["Tap", "half_depth", "new_side_head"]


def half_depth(body: nn.Module) -> str:
    """Path of the block after which the side head stands: where half of the residual branches are behind it.

    In the CIFAR networks that is block n // 2 of the middle stage, in others the last block of the first half, as the
    authors' scripts have it for CIFAR and for ImageNet.
    """
    slots = sorted([*removed_slots(body), *gates(body)], key=natural_order)
    middle = len(slots) // 2 if isinstance(body, EpsResNet) else max(len(slots) // 2 - 1, 0)
    return block_path(body, slots[middle])


def new_side_head(body: nn.Module) -> nn.Module:
    """BN-ReLU, global average pool and a linear layer, (B, C, H, W) -> (B, classes), for the block at half depth.

    Raises:
        ValueError: The block puts out no feature maps.
    """
    net: Any = meta_copy(body)
    tap = Tap(half_depth(body))
    with torch.no_grad(), tap.connect(net):
        net(probe_batch(net))
    if not (isinstance(tap.output, Tensor) and tap.output.ndim == 4):
        raise ValueError(
            f"{type(body).__name__} has no feature maps at half depth, which a side head could read; set "
            "side_loss_weight to 0."
        )
    width = tap.output.shape[1]
    return nn.Sequential(BatchNormAct2d(width), ClassifierHead(width, net.num_classes))


class Tap:
    """What one module of a network puts out while somebody listens.

    Args:
        path: Of the module.

    Attributes:
        output: Of the last call. Whoever takes it sets it to None: it holds a graph.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.output: Any = None
        self._module: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self._listens = False

    def connect(self, net: nn.Module) -> Tap:
        """Listen to what stands at the path now: a removal puts another module there."""
        module = net.get_submodule(self.path)
        if module is not self._module:
            if self._handle is not None:
                self._handle.remove()  # a removal carries hooks over
            self._module = module
            self._handle = module.register_forward_hook(self._note)
        return self

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._listens:  # not when a checkpointed block runs again in the backward pass
            self.output = output

    def __enter__(self) -> None:
        self._listens = True

    def __exit__(self, *exception: object) -> None:
        self._listens = False
