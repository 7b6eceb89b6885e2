"""Torch-Pruning (https://github.com/VainF/Torch-Pruning, Fang et al., CVPR 2023) removes channels, not blocks.

Torch-Pruning cannot trace the zero channels in the shortcuts of the CIFAR networks. So the shortcuts are first written
as 1x1 convolutions with equal outputs. Torch-Pruning may prune and train these as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from timm_eps.models.cifar_blocks import make_shortcuts_convolutions

STEPS = 10  # of the bisection
# The narrowest layers have 16 channels. Torch-Pruning does not change a layer if no channel would remain.
LARGEST = 0.9


def prune(model: nn.Module, images: Tensor, is_enough: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """Remove only as many channels as necessary.

    Every layer but the classifier loses the same share of its channels: those whose groups have the smallest norms.

    Args:
        model: A transformers model around a CIFAR network; changed in place.
        images: A batch (B, C, H, W).
        is_enough: Whether a pruned network is small or fast enough.

    Returns:
        ``ratio``, the removed share of each layer's channels, and ``reached``, whether it is enough. If no share is
        enough, the largest share is used.
    """
    body = plain(model.timm_model)
    low, high = 0.0, LARGEST
    best = without(body, high, images)
    reached = is_enough(best)
    for _ in range(STEPS if reached else 0):
        middle = (low + high) / 2
        net = without(body, middle, images)
        if is_enough(net):
            best, high = net, middle
        else:
            low = middle
    model.timm_model = best
    model.side_head = None  # the side head reads removed channels
    return {"ratio": high, "reached": reached}


def without(body: nn.Module, ratio: float, images: Tensor) -> nn.Module:
    """A copy of a network with a share of each layer's channels removed."""
    import torch_pruning

    pruned = copy.deepcopy(body).eval()
    torch_pruning.pruner.BasePruner(
        pruned,
        images.to(next(pruned.parameters()).device),
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        ignored_layers=[pruned.get_classifier()],
    ).step()
    return pruned


def plain(body: nn.Module) -> nn.Module:
    """A copy of a CIFAR network with convolutions as shortcuts and equal outputs."""
    body = copy.deepcopy(body)
    make_shortcuts_convolutions(body)
    return body
