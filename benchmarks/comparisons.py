"""The comparisons: a recipe on a data set, its seeds, and the changes for some rows of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import fashion, glyphs
from timm_eps.training.arguments import Arguments, parse_arguments

ROOT = Path(__file__).parent.parent
# Seeds and folds. Over the five folds each image of the digits is tested once. The first few runs come first.
FEW = [(0, 0), (1, 1), (2, 2)]
# Alternative lengths of the ramp to a budget.
_LATER = ("--epsilon_warmup_epochs", "8", "--ramp_epochs", "25")
_EARLIER = ("--epsilon_warmup_epochs", "8", "--ramp_epochs", "6")


@dataclass(frozen=True)
class Comparison:
    """One table of RESULTS.md.

    Args:
        title: Heading.
        config: The recipe, a file of arguments of train_hf.py.
        arguments: Further arguments of train_hf.py for all runs.
        classes: Number of classes.
        sides: Image sides for the latency, in pixels. The first is the side of the data.
        pairs: Seeds and folds.
        early: The method with an early budget and the dense network's compute. One column shows its lead over each row.
        changed: Arguments of train_hf.py by method, in addition to the recipe's.
        rows: The methods of the table; None for all.
        mixed_precision: Accelerate's setting, passed by the environment.
    """

    title: str
    config: Path
    classes: int
    sides: tuple[int, ...]
    pairs: list[tuple[int, int]]
    early: str
    arguments: tuple[str, ...] = ()
    changed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: tuple[str, ...] | None = None
    mixed_precision: str = "no"

    @property
    def flags(self) -> list[str]:
        """Arguments of train_hf.py that all runs share."""
        return ["--config", str(self.config), *self.arguments]

    def recipe(self, *flags: str) -> Arguments:
        """The arguments of a run, with further arguments of train_hf.py."""
        return parse_arguments([*self.flags, *flags])

    def length_of_epochs(self) -> str:
        """A sentence on the epochs of the recipe."""
        args = self.recipe().training
        length = f"{args.steps_per_epoch} steps" if args.steps_per_epoch else "a pass through the training images"
        return f"An epoch is {length}. A batch has {args.per_device_train_batch_size} images."


_DIGITS = Comparison(
    title="scikit-learn's digits: 1,797 real images, 8x8, 10 classes, five stratified folds",
    config=ROOT / "hub_configs/eps_resnet110.digits.json",
    classes=10,
    sides=(8, 32),
    pairs=[*FEW, *((seed, fold) for seed in range(3) for fold in range(5) if seed != fold)],
    early="budget_with_dense_compute",
    changed={
        # The smallest tested ε that removes 80 % of the parameters. It closes blocks at once, not one after the other,
        # so it gets a longer warm-up.
        "fixed": ("--epsilon_warmup_epochs", "8", "--epsilon", "2.5"),
        "other_criterion": ("--criterion", "importance"),
        "other_pace": _LATER,
        "other_pace_with_dense_compute": _LATER,
        "finetuned": ("--ramp_epochs", "25"),  # with the recipe's 8 epochs it was less accurate
        "smaller_budget": ("--keep", "8"),
    },
)
_GLYPHS = Comparison(
    title="Synthetic glyphs of fonts: 50,000 + 10,000 images, 32x32, 34 classes (`benchmarks/glyphs.py`)",
    config=ROOT / "benchmarks/glyphs.json",
    classes=len(glyphs.CLASSES),
    sides=(glyphs.SIDE,),
    pairs=[(seed, 0) for seed in range(3)],
    early="other_pace_with_dense_compute",
    changed={
        "fixed": ("--epsilon", "6.0"),  # at 12 all branches are removed
        "other_criterion": ("--criterion", "response"),
        "other_pace": _EARLIER,
        "other_pace_with_dense_compute": _EARLIER,
        "smaller_budget": ("--keep", "5", *_EARLIER),
    },
    mixed_precision="bf16",  # halves the time of a step with these images
)
_MAIN = (
    "dense", "budget", "budget_with_dense_compute", "scratch_with_dense_compute", "shallow",
    "shallow_with_dense_compute", "torch_pruning_to_size",
)  # fmt: skip
# Twice as deep, with the earlier ramp, and the largest budget that removes 80 % of the parameters.
_GLYPHS110 = replace(
    _GLYPHS,
    title="The same synthetic glyphs, at depth 110",
    config=ROOT / "benchmarks/glyphs110.json",
    early="budget_with_dense_compute",
    changed={},
    rows=_MAIN,
)
# The same number of steps with four times as many images each. It needs an accelerator.
_GLYPHS110_LARGE = replace(
    _GLYPHS110,
    title="The same synthetic glyphs, at depth 110, in larger batches",
    arguments=("--per_device_train_batch_size", "128"),
)
# Real images at the same scale, with the recipes of the glyphs.
_FASHION = replace(
    _GLYPHS,
    title="Fashion-MNIST: 60,000 + 10,000 real images, 28x28 read as 32x32, 10 classes (`benchmarks/fashion.py`)",
    config=ROOT / "benchmarks/fashion.json",
    classes=len(fashion.CLASSES),
    early="budget_with_dense_compute",
    changed={"other_criterion": ("--criterion", "response")},
    rows=("dense", "budget", "other_criterion", *_MAIN[2:]),
)
_FASHION110 = replace(
    _GLYPHS110,
    title="Fashion-MNIST at depth 110, in larger batches",
    config=ROOT / "benchmarks/fashion110.json",
    classes=len(fashion.CLASSES),
    arguments=("--per_device_train_batch_size", "128"),
    pairs=[(seed, 0) for seed in range(5)],
)
COMPARISONS = {
    "digits": _DIGITS,
    "glyphs": _GLYPHS,
    "glyphs110": _GLYPHS110,
    "glyphs110_large": _GLYPHS110_LARGE,
    "fashion": _FASHION,
    "fashion110": _FASHION110,
}
