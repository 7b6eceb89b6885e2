"""Batch norm over the batches of all processes, also on CPUs, which torch does not support."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

__all__ = ["synchronize_batchnorm"]


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """Make the batch norms of a model use mean and variance over the batches of all processes in training.

    Together the processes then compute the same as one process with their joint batch. On accelerators the layers
    become torch's ``SyncBatchNorm``, through timm. On the CPU they become layers with the same arithmetic.
    Parameters and buffers stay the same objects.

    Args:
        model: On the device it will train on, not wrapped. All processes must call this.

    Returns:
        The model, whose layers were exchanged in place.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _BatchNorm2d
        elif type(module) is BatchNormAct2d:
            module.__class__ = _BatchNormAct2d
    return model


class _SumOverProcesses(torch.autograd.Function):
    """A sum over processes. Each addend affects the loss of all processes, so the gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _SumOverProcesses.forward(ctx, grad)


def _normalize(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm in training over all processes: x (B, C, H, W), of sizes that may differ among them."""
    sums = torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])])
    *_, count = sums = _SumOverProcesses.apply(sums)
    mean = (sums[:-1] / count)[:, None, None]
    centred = x - mean
    # In a second pass, because the mean of squares minus the squared mean loses precision.
    var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.flatten(), share)
            norm.running_var.lerp_(var * (count / (count - 1)), share)
    x = centred * torch.rsqrt(var + norm.eps)[:, None, None]
    return x * norm.weight[:, None, None] + norm.bias[:, None, None] if norm.affine else x


def _is_shared(norm: nn.BatchNorm2d) -> bool:
    return norm.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalize(self, x) if _is_shared(self) else super().forward(x)


class _BatchNormAct2d(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normalize(self, x))) if _is_shared(self) else super().forward(x)
