"""Images to evaluate a saved network on, named by the data arguments of ``train_hf.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..hf.agreement import are_placeholders
from . import data
from .arguments import Arguments
from .arguments.checks import check_pairs
from .arguments.parsing import build_parser
from .inputs import input_of, load_splits, prepare_splits, starting_config

__all__ = ["EvaluationImages", "data_arguments"]

_BATCH = 128


def data_arguments(given: dict[str, Any], directory: str, seed: int) -> Arguments:
    """The arguments of a run that would begin with a saved network and read these images.

    Args:
        given: Data arguments of ``train_hf.py`` by name.
        directory: Where the network is saved.
        seed: Of the share of the training images that is held back, where no split is named: that of the run.

    Raises:
        ValueError: Two of them exclude each other, or one lacks another.
    """
    args = Arguments.of(vars(build_parser().parse_args([])))
    # Images are read when they are needed, in the geometry of evaluation.
    args = args.changed(**given, model_name_or_path=directory, seed=seed, augmentation="resized_crop")
    check_pairs(args.flat())
    return args


@dataclass(frozen=True)
class EvaluationImages:
    """Images that are evaluated on: the test images if they are named, else those to validate on.

    Attributes:
        split: The images.
        pretrained_cfg: timm's description of the input.
        dataset: Name of the data set.
        name: Name of the split.
        skip_corrupt: Whether images that cannot be read are left out.
    """

    split: data.Images
    pretrained_cfg: dict[str, Any]
    dataset: str
    name: str
    skip_corrupt: bool
    num_workers: int = 0

    @classmethod
    def load(cls, args: Arguments, most: int | None = None) -> EvaluationImages:
        """Find the images.

        Args:
            args: As of :func:`data_arguments`.
            most: Draw so many of them; all if None.

        Raises:
            ValueError: They are not there, or have other classes than the saved network.
        """
        config: Any = starting_config(args)
        raw, about, _ = load_splits(args)
        columns = data.find_columns(raw["train"].features, args.data.image_column_name, args.data.label_column_name)
        names, own = list(raw["train"].features[columns[1]].names), list(config.id2label.values())
        if len(names) != config.num_labels or (names != own and not are_placeholders(own)):
            raise ValueError(
                f"The data set has the {len(names)} classes {str(names[:5])[:100]}, the saved network has the "
                f"{config.num_labels} classes {str(own[:5])[:100]}. Name the data set that it was trained on."
            )
        pretrained_cfg = input_of(args.model, args.data, config, len(names))
        chosen = "test" if "test" in raw else "validation"
        rows = data.sample(raw[chosen], most, args.training.seed)
        [split] = prepare_splits(args.data, {chosen: rows}, columns, pretrained_cfg, None).values()
        name = (args.data.test_split_name or "test") if chosen == "test" else about["eval_split"]
        given = args.data
        return cls(
            split, pretrained_cfg, about["dataset"], name, given.corrupt_images == "skip", given.dataloader_num_workers
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W), normalised, and labels (B,).

        Raises:
            ValueError: An image cannot be read, and such images are not to be left out.
        """
        normalize = data.Normalize(self.pretrained_cfg)
        for images, labels, corrupt in data.evaluation_batches(self.split, _BATCH, num_workers=self.num_workers):
            if corrupt and not self.skip_corrupt:
                raise ValueError(
                    f"{corrupt[0]} is no image that can be read; --corrupt_images skip leaves such images out."
                )
            if len(labels):
                yield normalize(images), labels
