"""Accuracy of a classifier, in total and by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Evaluation", "count_correct"]


class Evaluation(NamedTuple):
    """Counts over the evaluated images.

    Attributes:
        correct: Number of correctly classified images of each class.
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
        """Fraction of correctly classified images."""
        return sum(self.correct) / self.images

    def by_class(self, names: Sequence[str]) -> dict[str, float]:
        """This fraction for each class that has images, by class name."""
        rows = zip(names, self.correct, self.seen, strict=True)
        return {name: correct / seen for name, correct, seen in rows if seen}


def count_correct(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Number of correctly classified images and of all images of each class in a batch, (2, classes), int64.

    Args:
        logits: Logits (B, classes).
        labels: Class numbers (B,).
        classes: Number of classes.
    """
    right = logits.argmax(-1) == labels
    return torch.stack([labels[right].bincount(minlength=classes), labels.bincount(minlength=classes)])
