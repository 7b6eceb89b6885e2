"""Loss and accuracy of a classifier on batches in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Batch", "Loss", "Score", "evaluate", "read_batch", "read_batches", "read_images", "score", "to_network",
]  # fmt: skip

Loss = Callable[[Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """Normalised images (B, C, H, W), and labels (B,) or class probabilities (B, classes)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Score:
    """Sums over images.

    Attributes:
        images: Number of images.
        loss_sum: Sum of the losses.
        correct: Number of correctly classified images.
    """

    images: int = 0
    loss_sum: float = 0.0
    correct: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.images + other.images, self.loss_sum + other.loss_sum, self.correct + other.correct)

    @property
    def loss(self) -> float:
        """Mean loss per image."""
        return self.loss_sum / self.images

    @property
    def accuracy(self) -> float:
        """Fraction of the images whose class has the largest logit."""
        return self.correct / self.images


def read_batches(batches: Iterable[Any], classes: int) -> list[Batch]:
    """All batches. They are read once, so a generator works, and no image is decoded twice.

    Args:
        batches: Pairs (images, labels), or mappings with ``pixel_values`` and ``labels``.
        classes: Number of classes of the network.

    Raises:
        ValueError: There is no batch, or a batch has another form, images that are not float (B, C, H, W), labels of
            another number or kind, or a label outside the network's classes.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping | str):
        raise ValueError(
            f"batches must be an iterable of (images, labels) or of dicts with pixel_values and labels, "
            f"got {type(batches).__name__}; put a single batch into a list."
        )
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        found = [read_batch(index, batch, classes) for index, batch in enumerate(batches)]
    if not any(len(batch.labels) for batch in found):
        raise ValueError("batches contains no images. A generator that was already read is empty; make a new one.")
    return [batch for batch in found if len(batch.labels)]


def read_batch(index: int, batch: Any, classes: int) -> Batch:
    """One batch, checked; the arguments and errors are those of :func:`read_batches`, and ``index`` is for messages."""
    name = f"Batch {index}"
    if isinstance(batch, Mapping):
        if missing := [key for key in ("pixel_values", "labels") if key not in batch]:
            raise ValueError(f"{name} has no {missing[0]!r}, only {', '.join(sorted(map(repr, batch)))[:200]}.")
        images, labels = batch["pixel_values"], batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        images, labels = batch
    else:
        raise ValueError(
            f"{name} must be a pair (images, labels) or a dict with pixel_values and labels, "
            f"got {type(batch).__name__}."
        )
    _check_images(name.lower(), images)
    if not (isinstance(labels, Tensor) and labels.shape in ((len(images),), (len(images), classes))):
        raise ValueError(
            f"The labels of {name.lower()} must be a tensor ({len(images)},) of class numbers or ({len(images)}, "
            f"{classes}) of probabilities, got {_described(labels)}."
        )
    if labels.ndim == 1 and labels.is_floating_point():
        raise ValueError(f"The labels of {name.lower()} must be whole class numbers, got {_described(labels)}.")
    if labels.ndim == 1 and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{name} has the label {int(labels.max() if labels.max() >= classes else labels.min())}, but the network "
            f"has the classes 0 to {classes - 1}."
        )
    labels = labels.detach()
    return Batch(images.detach(), labels.long() if labels.ndim == 1 else labels.float())


def read_images(name: str, batches: Iterable[Any], most: int) -> list[Tensor]:
    """The images of batches, read until there are enough of them.

    Args:
        name: What errors call the batches.
        batches: What :func:`read_batches` takes, or image tensors (B, C, H, W). Labels are not read.
        most: Number of images to read.

    Raises:
        ValueError: There is no image, or a batch is neither, or holds no float images (B, C, H, W).
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping | str):
        raise ValueError(
            f"{name} must be an iterable of image tensors, of (images, labels) or of dicts with pixel_values, "
            f"got {type(batches).__name__}; put a single batch into a list."
        )
    found: list[Tensor] = []
    left = most
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        for index, batch in enumerate(batches):
            images: Any = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
            if isinstance(batch, tuple | list) and len(batch) in (1, 2):
                images = batch[0]
            _check_images(f"batch {index} of {name}", images)
            found.append(images[:left].detach())
            left -= len(found[-1])
            if left <= 0:
                break
    if left == most:
        raise ValueError(f"{name} holds no images. A generator that was read before is empty; make a new one.")
    return [images for images in found if len(images)]


def _check_images(name: str, images: Any) -> None:
    if not (isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4):
        raise ValueError(
            f"The images of {name} must be a float tensor (B, C, H, W), normalised as the network reads them, "
            f"got {_described(images)}."
        )


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def score(logits: Tensor, labels: Tensor, loss: Loss = F.cross_entropy) -> Score:
    """Score of one batch.

    Args:
        logits: Logits (B, classes).
        labels: Labels (B,) or (B, classes), on any device.
        loss: Function of logits and labels that returns the mean loss.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    return Score(
        len(labels), float(loss(logits, labels)) * len(labels), int((logits.argmax(1) == classes).sum())
    )  # fmt: skip


def evaluate(body: nn.Module, batches: Iterable[Batch], loss: Loss = F.cross_entropy) -> Score:
    """Score of a network in evaluation mode."""
    total = Score()
    with torch.no_grad():
        for images, labels in batches:
            total += score(body(to_network(body, images)), labels, loss)
    return total


def to_network(body: nn.Module, images: Tensor) -> Tensor:
    """Images on the device and with the dtype of a network's weights."""
    parameter = next(body.parameters())
    return images.to(parameter.device, parameter.dtype, non_blocking=True)
