"""The dense network for comparison, and thumbnails of images whose answer changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from ..analysis.answers import Answers, compare_answers
from ..analysis.evaluation import to_network
from ..files.value_checks import shortened
from ..hf.agreement import are_placeholders, differing_statistics
from ..surgery.branches import evaluating
from .saved import SavedNetwork

__all__ = ["answers_of", "load_dense", "thumbnail"]

_SIDE = 96


def load_dense(dense: nn.Module | str | PathLike[str], network: SavedNetwork) -> nn.Module:
    """The dense network. It must have the classes and the input normalisation of the saved network.

    Args:
        dense: A model, a directory, or a name on the Hub.
        network: The saved network.

    Raises:
        ValueError: The classes or the normalisation differ.
    """
    model: Any = dense if isinstance(dense, nn.Module) else AutoModelForImageClassification.from_pretrained(str(dense))
    config = getattr(model, "config", None)
    names = network.class_names
    theirs = list((getattr(config, "id2label", None) or {}).values())
    if len(theirs) not in (0, len(names)):
        raise ValueError(f"The dense network has {len(theirs)} classes, the saved network has {len(names)}.")
    if theirs and theirs != names and not are_placeholders(theirs) and not are_placeholders(names):
        raise ValueError(
            f"The dense network has the classes {shortened(theirs)}, the saved network has {shortened(names)}. The "
            "comparison needs the same classes in the same order."
        )
    cfg = getattr(config, "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
    own = network.body.pretrained_cfg
    if field := differing_statistics(cfg, own):
        raise ValueError(
            f"The dense network reads images with {field} {shortened(cfg[field])}, the saved network with "
            f"{shortened(own[field])}. The comparison needs one normalisation."
        )
    return model


def answers_of(network: SavedNetwork, batches: Iterable[Any], dense: nn.Module | None) -> Answers:
    """The answers of the saved network and, if given, of the dense network.

    Raises:
        ValueError: The saved network has no classifier, or the batches do not fit it.
    """
    if not network.body.num_classes:
        raise ValueError(
            f"The network in {network.directory} has no classifier, so it has no accuracy; leave the images out."
        )
    with evaluating(network.model), evaluating(dense or nn.Identity()):
        before = None if dense is None else _logits(dense)
        return compare_answers(_logits(network.model), batches, network.body.num_classes, before)


def _logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def logits(images: Tensor) -> Tensor:
        answer = model(to_network(model, images))
        return getattr(answer, "logits", answer)

    return logits


def thumbnail(image: Tensor, cfg: dict[str, Any]) -> str:
    """An image as a data URI.

    Args:
        image: The image (C, H, W) as input of the network. With other than three channels, the first is shown in grey.
        cfg: timm's description of the input, with ``mean`` and ``std``.
    """
    from PIL import Image

    mean, std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = (image * std + mean) if len(mean) in (1, len(image)) else image
    pixels = pixels[:3] if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
    array = (pixels.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array, "RGB")
    is_small = max(picture.size) <= _SIDE
    if not is_small:
        picture.thumbnail((2 * _SIDE, 2 * _SIDE))
    file, kind = io.BytesIO(), "png" if is_small else "jpeg"
    picture.save(file, kind, **({} if is_small else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
