"""What a classifier gets right, by class."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from . import data
from .inputs import note_corrupt

__all__ = ["Evaluation", "evaluate"]


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


@torch.no_grad()
def evaluate(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    splits: Mapping[str, data.Images],
    normalize: data.Normalize,
    known_corrupt: list[str] | None = None,
    split: str = "validation",
) -> Evaluation:
    """What a network gets right of the images of a split, over all processes."""
    model.eval()
    images = splits[split]
    classes = len(images.label_names)
    count = torch.zeros(2, classes, dtype=torch.int64, device=accelerator.device)  # correct ones, all
    for batch, labels, corrupt in data.evaluation_batches(
        images, args.per_device_eval_batch_size, rank=accelerator.process_index, processes=accelerator.num_processes,
        num_workers=args.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda",
    ):  # fmt: skip
        note_corrupt(args, corrupt, split, [] if known_corrupt is None else known_corrupt)
        if len(labels):
            pixels, labels = (x.to(accelerator.device, non_blocking=True) for x in (batch, labels))
            right = model(normalize(pixels)).logits.argmax(-1) == labels
            count += torch.stack([labels[right].bincount(minlength=classes), labels.bincount(minlength=classes)])
    correct, seen = accelerator.reduce(count).tolist()
    if not sum(seen):
        raise ValueError(f"No image of the {split} split can be read.")
    return Evaluation(correct, seen)
