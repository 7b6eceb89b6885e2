"""Fashion-MNIST on the device: training subsets, and batches in the network's input format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pretrained.prepare import IMAGES
from timm_eps.training.data import Normalize, PadCropFlip


@dataclass(frozen=True)
class Labelled:
    """Images (N, 1, 28, 28) as uint8 and labels (N,) as int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Labelled:
        return Labelled(self.images[indices], self.labels[indices])

    def batches(self, size: int) -> Iterator[Labelled]:
        """All images in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield Labelled(self.images[start : start + size], self.labels[start : start + size])


@functools.lru_cache(maxsize=4)
def load(directory: Path, split: str, classes: tuple[int, ...], device: torch.device) -> Labelled:
    """The images of some classes, renumbered from 0.

    Args:
        directory: Directory written by ``prepare.py``.
        split: ``train`` or ``test``.
        classes: Labels of Fashion-MNIST, sorted.
        device: Device of the images.
    """
    with np.load(directory / IMAGES) as arrays:
        labels = arrays[f"{split}_labels"]
        chosen = np.isin(labels, classes)
        images = arrays[f"{split}_images"][chosen]
    numbered = np.searchsorted(np.asarray(classes), labels[chosen])
    return Labelled(torch.from_numpy(images)[:, None].to(device), torch.from_numpy(numbered).to(device))


def divide(labelled: Labelled, count: int, seed: int) -> tuple[Labelled, Labelled]:
    """A random subset with the same number of images per class, and the remaining images.

    If the number of classes does not divide ``count``, the first classes have one more image. If there are fewer images
    than ``count``, all are taken.
    """
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed))
    labels = labelled.labels.cpu()[order]
    classes = int(labels.max()) + 1
    # Rank of each image within its class, in random order. The lowest ranks are taken.
    ranks = torch.zeros(len(labels), dtype=torch.int64)
    for label in range(classes):
        (places,) = torch.where(labels == label)
        ranks[places] = torch.arange(len(places))
    chosen = order[torch.argsort(ranks * classes + labels)]
    device = labelled.labels.device
    return labelled.take(chosen[:count].to(device)), labelled.take(chosen[count:].to(device))


class Reader(nn.Module):
    """Convert uint8 images (B, 1, 28, 28) to the network's input (B, 3, side, side), float32, channels last.

    Args:
        side: Height and width in pixels.
        cfg: timm's description of the input, with ``mean`` and ``std``.
    """

    def __init__(self, side: int, cfg: dict) -> None:
        super().__init__()
        self.side = side
        self.normalize = Normalize(cfg)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if images.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return self.normalize(x.expand(-1, 3, -1, -1)).contiguous(memory_format=torch.channels_last)


def training_batches(labelled: Labelled, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented uint8 images and labels for each step. Every pass has a new order and no smaller last batch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(labelled))
    augment: Callable[[Tensor], Tensor] = PadCropFlip(padding=2, flip=True)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(labelled), generator=generator)
        chosen, order = order[:size].to(labelled.labels.device), order[size:]
        batch = labelled.take(chosen)
        yield augment(batch.images), batch.labels
