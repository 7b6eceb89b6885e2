"""What two classifiers answer to the same images: who is right, which classes are confused, which answers changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .evaluation import read_batch

__all__ = ["Answers", "Change", "Difference", "compare_answers", "paired_difference"]

# Two-sided 95 % quantile of the normal distribution.
_NORMAL = 1.959964


class Difference(NamedTuple):
    """Difference of two accuracies on the same images, with a 95 % interval.

    Attributes:
        value: Accuracy after less accuracy before, from -1 to 1.
        lower: Lower end of the interval.
        upper: Upper end of the interval.
        lost: Number of images that were right before and are wrong now.
        won: Number of images that were wrong before and are right now.
    """

    value: float
    lower: float
    upper: float
    lost: int
    won: int


class Change(NamedTuple):
    """An image whose answer changed.

    Attributes:
        image: The image (C, H, W), as the network reads it.
        label: Its true class.
        before: The answer of the first network.
        after: The answer of the second network.
    """

    image: Tensor
    label: int
    before: int
    after: int


@dataclass(frozen=True)
class Answers:
    """The answers of one network, or of two, to the same labelled images.

    Attributes:
        classes: Number of classes.
        labels: True classes (N,).
        after: Answers of the network (N,).
        before: Answers of the network that it is compared with (N,); None if there is no other.
        lost: Some images that were right before and are wrong now, in the order of the data.
        won: Some images that were wrong before and are right now.
    """

    classes: int
    labels: Tensor
    after: Tensor
    before: Tensor | None = None
    lost: list[Change] = field(default_factory=list)
    won: list[Change] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Fraction of the images that are right now."""
        return self._accuracy(self.after)

    @property
    def accuracy_before(self) -> float | None:
        """Fraction of the images that were right before."""
        return None if self.before is None else self._accuracy(self.before)

    @property
    def difference(self) -> Difference | None:
        """The paired difference of both accuracies."""
        if self.before is None:
            return None
        return paired_difference(self.before == self.labels, self.after == self.labels)

    @property
    def changed(self) -> int:
        """Number of images whose answer changed, right or wrong."""
        return 0 if self.before is None else int((self.before != self.after).sum())

    def by_class(self, answers: Tensor) -> dict[int, float]:
        """Accuracy of each class that has images, by its number."""
        seen = self.labels.bincount(minlength=self.classes).tolist()
        right = self.labels[answers == self.labels].bincount(minlength=self.classes).tolist()
        return {number: right[number] / count for number, count in enumerate(seen) if count}

    def confusion(self, answers: Tensor) -> Tensor:
        """Number of images (classes, classes): a row for each true class, a column for each answer."""
        cells = self.labels * self.classes + answers
        return cells.bincount(minlength=self.classes**2).view(self.classes, self.classes)

    def confused(self, answers: Tensor) -> dict[tuple[int, int], int]:
        """Number of images by (true class, wrong answer), without a matrix, whose size is the square of the classes."""
        wrong = answers != self.labels
        cells, counts = (self.labels[wrong] * self.classes + answers[wrong]).unique(return_counts=True)
        return {divmod(cell, self.classes): n for cell, n in zip(cells.tolist(), counts.tolist(), strict=True)}

    def _accuracy(self, answers: Tensor) -> float:
        return (answers == self.labels).double().mean().item()


def paired_difference(before: Tensor, after: Tensor) -> Difference:
    """The difference of two accuracies on the same images, with its 95 % interval.

    The interval is that of Agresti and Min (Statistics in Medicine, 2005): half an image is added to each cell of the
    2x2 table. It keeps its coverage where few answers differ. It knows the chance of the images alone, not that of
    another training.

    Args:
        before: Whether each image was right (N,), bool.
        after: Whether each image is right now (N,), bool.
    """
    images, lost, won = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    center = (won - lost) / (images + 2)
    deviation = math.sqrt((won + lost + 1) - (won - lost) ** 2 / (images + 2)) / (images + 2)
    lower, upper = center - _NORMAL * deviation, center + _NORMAL * deviation
    return Difference((won - lost) / images, max(lower, -1.0), min(upper, 1.0), lost, won)


@torch.no_grad()
def compare_answers(
    after: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    classes: int,
    before: Callable[[Tensor], Tensor] | None = None,
    most: int = 24,
) -> Answers:
    """Let two networks answer; each batch is read once and then forgotten, but for a few images.

    Args:
        after: The network: images (B, C, H, W) to logits (B, classes).
        batches: As for :func:`timm_eps.analyze`.
        classes: Number of classes.
        before: The network to compare with.
        most: How many images of each kind of change to keep.

    Raises:
        ValueError: A batch is not as expected, there is none, or the networks have different numbers of classes.
    """
    labels: list[Tensor] = []
    answers: dict[str, list[Tensor]] = {"after": [], "before": []}
    lost: list[Change] = []
    won: list[Change] = []
    for index, given in enumerate(batches):
        batch = read_batch(index, given, classes)
        if not len(batch.labels):
            continue
        truth = (batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)).cpu()
        labels.append(truth)
        now = _answer(after, batch.images, classes)
        answers["after"].append(now)
        if before is None:
            continue
        then = _answer(before, batch.images, classes)
        answers["before"].append(then)
        for kept, chosen in ((lost, (then == truth) & (now != truth)), (won, (then != truth) & (now == truth))):
            for place in chosen.nonzero().flatten().tolist()[: most - len(kept)]:
                image = batch.images[place].float().cpu().clone()
                kept.append(Change(image, int(truth[place]), int(then[place]), int(now[place])))
    if not labels:
        raise ValueError("batches holds no images. A generator that was read before is empty; make a new one.")
    found = {name: torch.cat(parts) if parts else None for name, parts in answers.items()}
    assert found["after"] is not None
    return Answers(classes, torch.cat(labels), found["after"], found["before"], lost, won)


def _answer(network: Callable[[Tensor], Tensor], images: Tensor, classes: int) -> Tensor:
    logits = network(images)
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise ValueError(
            f"The dense network answers with a tensor of shape {tuple(logits.shape)}; the saved network has {classes} "
            "classes. Give a dense network with the same classes."
        )
    return logits.argmax(1).cpu()
