"""What a classifier gets right, by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Evaluation", "count_correct"]


class Evaluation(NamedTuple):
    """Counts over the images that were tested on.

    Attributes:
        correct: Number of images of each class that are classified correctly.
        seen: Number of images of each class.
    """

    correct: list[int]
    seen: list[int]

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(self.seen)

    @property
    def accuracy(self) -> float:
        """Fraction of the images that are classified correctly."""
        return sum(self.correct) / self.images

    def by_class(self, names: Sequence[str]) -> dict[str, float]:
        """That fraction of each class that has images, by its name."""
        rows = zip(names, self.correct, self.seen, strict=True)
        return {name: correct / seen for name, correct, seen in rows if seen}


def count_correct(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Of a batch: the images of each class that are classified correctly, and all of them, (2, classes), int64.

    Args:
        logits: (B, classes).
        labels: Class numbers (B,).
        classes: Number of classes.
    """
    right = logits.argmax(-1) == labels
    return torch.stack([labels[right].bincount(minlength=classes), labels.bincount(minlength=classes)])
