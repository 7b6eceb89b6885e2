"""The images on which verbs compare branches, by the flags of ``train_hf.py``."""

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
    "train_dir": ("DIR", "a directory with one sub-directory of images a class"),
    "image_size": ("N", "side in pixels; default that of the network"),
}
# Accepted, but left out of the help, which has to fit one screen.
_HIDDEN = (
    "dataset_config_name", "train_split_name", "train_val_split", "image_column_name", "label_column_name", "streaming",
    "corrupt_images", "fold", "crop_pct", "ignore_mismatched_sizes",
)  # fmt: skip
_EPILOG = "Without a data set: scikit-learn's digits. The other data flags of `timm-eps train` work, too."
_MOST = 1024  # choices.ANALYSED, which is not imported for a parser: it brings the libraries of the training


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which images branches are compared on."""
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
    """Add the flags that say how much may stay. Returns their group, of which one flag may be given."""
    described = {each.name: each.metadata for each in fields(PruningArguments)}
    group = parser.add_mutually_exclusive_group(required=required)
    for name, kind in BUDGETS.items():
        help = f"{kind.unit} that may stay: a share (0.5) or a number"
        group.add_argument(f"--{name}", **{**described[name], "help": help, "metavar": "X"})
    size = {**described["latency_batch_size"], "help": "images of the pass that is timed; default 32", "metavar": "N"}
    parser.add_argument("--latency_batch_size", **size)
    return group


def arguments_of(args: argparse.Namespace, **values: Any) -> Arguments:
    """The arguments of a training that would begin with the same network, images and budget.

    Args:
        args: Of a verb with the flags of :func:`add_images`, :func:`add_budgets` and :func:`.networks.add_model`.
        values: Further arguments by name.
    """
    known = vars(build_parser().parse_args([]))
    given = {name: value for name, value in vars(args).items() if name in known}
    # A single image to validate on, as none is needed; and no side head, which only a training needs.
    read = {"max_train_samples": args.images, "max_eval_samples": 1, "dry_run": True, "side_loss_weight": 0.0}
    return Arguments.of(known | given | read | model_fields(args) | values)


class Prepared(NamedTuple):
    """A network with images to compare its branches on.

    Attributes:
        model: A transformers model of this package, in evaluation mode on the device of the process.
        batches: Normalised images (B, 3, H, W) with labels (B,), on the same device.
        is_trained: Whether the classifier was saved with the network for these classes.
        dataset: What the images are called.
    """

    model: Any
    batches: list[tuple[Tensor, Tensor]]
    is_trained: bool
    dataset: str


def prepare(given: Arguments) -> Prepared:
    """Read the images and load the network.

    Args:
        given: What :func:`arguments_of` returned.

    Raises:
        ValueError: The images and the network do not go together, or one of them cannot be read.
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
