"""Augmentation of whole batches on their device, and normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Distort", "Draws", "Normalize", "PadCropFlip", "channel_mean", "pixel_mean"]


class Draws:
    """Random numbers, one row for each image of a batch.

    If several processes share a batch, each draws numbers for the whole batch from generators in the same state, and
    keeps the rows of its part. The result is the same as with one process.

    Args:
        generator: Generator on the CPU; torch's global one if None.
        rank: Index of this process's part of the batch.
        processes: Number of equal parts of the batch.
    """

    def __init__(self, generator: torch.Generator | None = None, rank: int = 0, processes: int = 1) -> None:
        self.generator = generator
        self.rank = rank
        self.processes = processes

    def integers(self, end: int, batch: int) -> Tensor:
        """Whole numbers from 0 to ``end - 1``, (batch, 1)."""
        return self._own(torch.randint(end, (batch * self.processes, 1), generator=self.generator))

    def uniform(self, batch: int, *shape: int) -> Tensor:
        """Numbers from 0 to 1, (batch, *shape)."""
        return self._own(torch.rand((batch * self.processes, *shape), generator=self.generator))

    def _own(self, numbers: Tensor) -> Tensor:
        return numbers.chunk(self.processes)[self.rank]


class PadCropFlip(nn.Module):
    """The augmentation of the CIFAR recipe on a uint8 batch: zero padding, a random crop, a random mirror image.

    (B, C, H, W) -> (B, C, H, W), with one offset and one flip decision per image, drawn on the CPU. The result is in
    channels-last memory format.

    Args:
        padding: Pixels on each side.
        flip: Whether to mirror half the images.
    """

    def __init__(self, padding: int, flip: bool) -> None:
        super().__init__()
        self.padding = padding
        self.flip = flip

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        draws = draws or Draws()
        batch, channels, height, width = images.shape
        padded = F.pad(images, (self.padding,) * 4).permute(0, 2, 3, 1)
        rows, columns = (draws.integers(2 * self.padding + 1, batch) + torch.arange(n) for n in (height, width))
        if self.flip:
            columns = torch.where(draws.uniform(batch, 1) < 0.5, columns.flip(1), columns)
        # One gather of whole pixels, by the flat index of each pixel of each crop in the padded images.
        first = torch.arange(batch) * padded[0, ..., 0].numel()
        place = first[:, None, None] + rows[:, :, None] * padded.shape[2] + columns[:, None, :]
        pixels = padded.reshape(-1, channels).index_select(0, _beside(images, place.flatten()))
        return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Distort(nn.Module):
    """The augmentation of the SVHN recipe on a uint8 batch: brightness, contrast, a smooth deformation, a random crop.

    (B, C, H, W) -> (B, C, H, W), with separate random numbers for each image, drawn on the CPU. Brightness changes by
    up to 10 of 255, contrast by up to a fifth. The deformation moves four anchors in the padded image by up to 3 pixels
    (of 40), and pixels around them by less, as a Gaussian of the distance.

    Args:
        padding: Pixels on each side.

    Source: https://github.com/yuxwind/epsilonResnet, the SVHN script.
    """

    ANCHORS = (0.2, 0.8)  # in both directions, as a fraction of the side
    VARIANCE = 0.2  # in squares of the side
    LARGEST_SHIFT = 3 / 40  # of the side

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        draws = draws or Draws()
        batch, _, height, width = images.shape
        x = F.pad(images, (self.padding,) * 4).float()
        brightness, contrast = (_beside(x, 2 * draws.uniform(batch, 1, 1, 1) - 1) for _ in range(2))
        x = (x + 10 * brightness).clamp_(0, 255)
        mean = x.mean((2, 3), keepdim=True)
        x = ((x - mean) * (1 + 0.2 * contrast) + mean).clamp_(0, 255)
        # Position of each pixel of the crop in the padded image, and its source position, both from 0 to 1.
        sides = height + 2 * self.padding, width + 2 * self.padding
        rows, columns = (
            (draws.integers(2 * self.padding + 1, batch) + torch.arange(n) + 0.5) / side
            for n, side in zip((height, width), sides, strict=True)
        )
        near_row, near_column = (
            torch.exp(-((place[:, :, None] - torch.tensor(self.ANCHORS)) ** 2) / self.VARIANCE)
            for place in (rows, columns)
        )
        shifts = self.LARGEST_SHIFT * (2 * draws.uniform(batch, 2, 2, 2) - 1)
        moved = torch.einsum("bhr,bwc,bdrc->bhwd", near_row, near_column, shifts)
        place = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3)
        grid = _beside(x, 2 * (place + moved) - 1)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        return x.round_().clamp_(0, 255).to(images.dtype)


def _beside(other: Tensor, drawn: Tensor) -> Tensor:
    """``drawn`` on the device of ``other``, through pinned memory, because other copies wait for the device."""
    return drawn.pin_memory().to(other.device, non_blocking=True) if other.is_cuda else drawn.to(other.device)


class Normalize(nn.Module):
    """uint8 images (B, C, H, W) to the network's input, float32, bit for bit like timm's evaluation transform.

    Args:
        pretrained_cfg: timm's description of the input, with ``mean`` and ``std`` on the scale from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pretrained_cfg: dict[str, Any]) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(pretrained_cfg[name]).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # In place after the first operation, because on the CPU memory allocation takes longer than the arithmetic.
        return images.to(torch.float32, copy=True).div_(255).sub_(self.mean).div_(self.std)


def channel_mean(images: Tensor) -> list[float]:
    """Mean of each channel of uint8 images (N, C, H, W), on the scale from 0 to 1."""
    return (pixel_mean(images).mean((1, 2)) / 255).tolist()


def pixel_mean(images: Tensor) -> Tensor:
    """Mean of each pixel of uint8 images (N, C, H, W): float64 (C, H, W), on the scale from 0 to 255."""
    return images.sum(0, dtype=torch.int64).double() / len(images)
