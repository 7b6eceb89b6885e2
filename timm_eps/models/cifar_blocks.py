"""Parts of the CIFAR network of ε-ResNet: block, shortcut between stages, stage, and pixel mean."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath
from timm.models import checkpoint_seq
from torch import Tensor, nn

from ..gate import EpsilonGate

__all__ = [
    "PixelMean", "PoolPadShortcut", "PreActBasic", "Stage", "init_weights", "make_shortcuts_convolutions",
]  # fmt: skip


class PoolPadShortcut(nn.Module):
    """Parameter-free shortcut where a stage halves the resolution: 2x2 average pooling, zero channels on both sides.

    (B, C, H, W) -> (B, C', H / 2, W / 2), with the C channels in the middle of the C'. Odd sizes round up, as in the
    strided convolution of the branch.
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.in_chs, self.out_chs = in_chs, out_chs
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        before = (out_chs - in_chs) // 2
        self.padding = (0, 0, 0, 0, before, out_chs - in_chs - before)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.pool(x), self.padding)

    @torch.no_grad()
    def as_convolution(self) -> nn.Sequential:
        """Equivalent pooling and 1x1 convolution of zeros and ones."""
        convolution = nn.Conv2d(self.in_chs, self.out_chs, 1, bias=False)
        convolution.weight.copy_(torch.eye(self.out_chs, self.in_chs).roll(self.padding[4], 0)[:, :, None, None])
        return nn.Sequential(self.pool, convolution)

    def extra_repr(self) -> str:
        return f"padding={self.padding}"


def make_shortcuts_convolutions(body: nn.Module) -> None:
    """Replace channel padding by equivalent convolutions in place, because some tools do not support padding."""
    like = next(body.parameters())
    for path, module in list(body.named_modules()):
        if isinstance(module, PoolPadShortcut):
            body.set_submodule(path, module.as_convolution().to(like))


class PreActBasic(nn.Module):
    """Basic block x + S(conv(BN-ReLU(conv(BN-ReLU(x))))), shape (B, C, H, W) -> (B, C', H / stride, W / stride).

    Unlike timm's block, it supports a shortcut without parameters, and the first BN-ReLU can be left out.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        norm_layer: Callable[..., nn.Module],
        stride: int = 1,
        preact: bool = True,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.downsample = nn.Identity() if stride == 1 and in_chs == out_chs else PoolPadShortcut(in_chs, out_chs)
        self.norm1 = norm_layer(in_chs, **dd) if preact else nn.Identity()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm2 = norm_layer(out_chs, **dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else None
        self.drop_path = EpsilonGate(drop_path=drop_path, single_zero=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(self.norm1(x))
        residual = self.conv2(self.norm2(residual))
        return self.drop_path(residual) + self.downsample(x)


class Stage(nn.Module):
    """Blocks of one width. Removed blocks are identities, so the others keep their names."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def reparameterize(self) -> None:
        """Drop the identities, for inference only. ``timm.utils.reparameterize_model`` calls this."""
        # The names stay the same, so trained weights can still be loaded.
        left = {name: block for name, block in self.blocks.named_children() if not isinstance(block, nn.Identity)}
        self.blocks = nn.Sequential(OrderedDict(left))


class PixelMean(nn.Module):
    """Subtracts an individual mean from each pixel: (B, C, H, W) -> (B, C, H, W), for a fixed height and width.

    This is the paper's input on CIFAR. Image processors subtract only the mean of the channels, so this is a part of
    the network. ``mean`` (C, H, W) is the remaining mean, in units of the normalised images.
    """

    if TYPE_CHECKING:  # TorchScript cannot read it
        mean: Tensor

    def __init__(self, channels: int, height: int, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, height, width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


def init_weights(module: nn.Module) -> None:
    """Initialise one convolution or linear layer. Norms keep torch's initialisation."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
