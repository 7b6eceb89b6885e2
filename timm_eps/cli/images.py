"""Images for comparing branches, chosen by the flags of ``train_hf.py``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from ..budget import BUDGETS
from ..training.arguments import Arguments, DataArguments, ModelArguments, PruningArguments
from ..training.arguments.options import at_least
from ..training.arguments.parsing import build_parser
from .networks import model_fields

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SHOWN", "Prepared", "add_budgets", "add_images", "arguments_of", "prepare"]

SHOWN = {
    "dataset_name": ("NAME", "a data set on the Hub, or a directory that datasets reads"),
    "train_dir": ("DIR", "a directory with one sub-directory of images per class"),
    "image_size": ("N", "side in pixels; default: the network's"),
}
# Accepted, but hidden, so that the help fits one screen.
_HIDDEN = (
    "dataset_config_name", "train_split_name", "train_val_split", "image_column_name", "label_column_name", "streaming",
    "corrupt_images", "fold", "crop_pct", "ignore_mismatched_sizes",
)  # fmt: skip
_EPILOG = "Without a data set: scikit-learn's digits. The other data flags of `timm-eps train` work, too."
_MOST = 1024  # equals choices.ANALYSED, whose import would load the training libraries


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the images."""
    described = {each.name: each.metadata for kind in (DataArguments, ModelArguments) for each in fields(kind)}
    for name in (*SHOWN, *_HIDDEN):
        shown: dict[str, Any] = {"help": argparse.SUPPRESS}
        if name in SHOWN:
            shown = dict(zip(("metavar", "help"), SHOWN[name], strict=True))
        parser.add_argument(f"--{name}", **{**described[name], **shown})
    parser.add_argument(
        "--images", type=_number_of_images, default=_MOST, metavar="N", help="training images to read, at most 1024"
    )
    parser.epilog = _EPILOG


def add_budgets(parser: argparse.ArgumentParser, *, required: bool = False) -> Any:
    """Add the flags of the budgets. Returns their group, which accepts one flag."""
    described = {each.name: each.metadata for each in fields(PruningArguments)}
    group = parser.add_mutually_exclusive_group(required=required)
    for name, kind in BUDGETS.items():
        help = f"limit on {kind.unit}: a share (0.5) or a number"
        group.add_argument(f"--{name}", **{**described[name], "help": help, "metavar": "X"})
    size = {
        **described["latency_batch_size"],
        "help": "batch size of the timed forward pass; default 32",
        "metavar": "N",
    }
    parser.add_argument("--latency_batch_size", **size)
    return group


def arguments_of(args: argparse.Namespace, **values: Any) -> Arguments:
    """Training arguments for the same network, images and budget.

    Args:
        args: Arguments of a verb that uses :func:`add_images`, :func:`add_budgets` and :func:`.networks.add_model`.
        values: Further arguments by name.
    """
    known = vars(build_parser().parse_args([]))
    given = {name: value for name, value in vars(args).items() if name in known}
    # One validation image, because none is needed. No side head, because only training needs it.
    read = {"max_train_samples": args.images, "max_eval_samples": 1, "dry_run": True, "side_loss_weight": 0.0}
    return Arguments.of(known | given | read | model_fields(args) | values)


class Prepared(NamedTuple):
    """A network, and images for comparing its branches.

    Attributes:
        model: A transformers model of this package, in evaluation mode on the device of the process.
        batches: Normalised images (B, 3, H, W) with labels (B,), on the same device.
        is_trained: Whether the saved classifier is for these classes.
        dataset: Name of the images.
    """

    model: Any
    batches: list[tuple[Tensor, Tensor]]
    is_trained: bool
    dataset: str


def prepare(given: Arguments) -> Prepared:
    """Read the images and load the network.

    Args:
        given: Result of :func:`arguments_of`.

    Raises:
        ValueError: The images do not fit the network, or one of them cannot be read.
        ImportError: A library of the extra ``train`` is not installed.
    """
    import torch
    from transformers.utils import logging

    from ..training import beginning, build
    from ..training.arguments.checks import check_pairs
    from ..training.inputs import ImageData
    from ..training.launching import start_accelerator

    logging.disable_progress_bar()
    check_pairs(given.flat())
    accelerator = start_accelerator(given)
    images = ImageData.load(given, accelerator)
    torch.manual_seed(given.training.seed)
    model = build.model(given.model, given.paper, images).to(accelerator.device).eval()
    batches = images.analysed(accelerator.device)
    return Prepared(model, batches, beginning.knows_classes(given.model, images), str(images.about["dataset"]))


def _number_of_images(text: str) -> int:
    if (value := at_least(1)(text)) > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}, got {text}")
    return value
