"""The training loss of ``train_hf.py``: label smoothing, mixup and CutMix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

__all__ = ["label_mixer", "smooth_labels", "soft_cross_entropy"]

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def soft_cross_entropy(
    labels: Tensor, logits: Tensor, config: Any = None, label_smoothing: float = 0.0, **unused: Any
) -> Tensor:
    """Mean cross-entropy, with the signature of a transformers ``loss_function``.

    Args:
        labels: Class numbers (B,) or class probabilities (B, classes).
        logits: Logits (B, classes).
        config: Configuration of the model; not used.
        label_smoothing: Probability that is spread evenly over all classes.
        unused: Further arguments that transformers passes on.
    """
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def smooth_labels(model: nn.Module, label_smoothing: float) -> None:
    """Give a transformers model of this package a loss for smoothed or mixed labels.

    transformers' own loss would treat labels with decimals as multi-label targets.
    """
    model.loss_function = partial(soft_cross_entropy, label_smoothing=label_smoothing)  # type: ignore[assignment]


def label_mixer(classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> Mixer | None:
    """Mix each image of a batch with another one, with mixup or CutMix. If both are on, one is drawn for each batch.

    Args:
        classes: Number of classes.
        mixup_alpha: Parameter of mixup's beta distribution (https://arxiv.org/abs/1710.09412); 0 turns it off.
        cutmix_alpha: Parameter of CutMix (https://arxiv.org/abs/1905.04899); 0 turns it off.

    Returns:
        Function of images (B, C, H, W) and labels (B,) to mixed images and class probabilities (B, classes); None if
        both are off.
    """
    kinds: list[Any] = []
    if mixup_alpha:
        kinds.append(v2.MixUp(alpha=mixup_alpha, num_classes=classes))
    if cutmix_alpha:
        kinds.append(v2.CutMix(alpha=cutmix_alpha, num_classes=classes))
    return v2.RandomChoice(kinds) if kinds else None
