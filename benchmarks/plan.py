"""Which runs each comparison consists of."""

from __future__ import annotations

import argparse

from benchmarks.jobs import ROOT, Job
from benchmarks.methods import METHODS
from timm_eps.pruner import CRITERIA
from timm_eps.train_arguments import parse_arguments, used_arguments

FLAGS = {
    "digits": ["--config", str(ROOT / "hub_configs/eps_resnet110.digits.json")],
    "glyphs": ["--config", str(ROOT / "benchmarks/glyphs.json")],
    # Twice as deep, at the earlier pace, with the largest budget at which 80 % of the parameters go.
    "glyphs110": ["--config", str(ROOT / "benchmarks/glyphs110.json")],
}
CLASSES = {"digits": 10, "glyphs": 34, "glyphs110": 34}
SIDES = {"digits": (8, 32), "glyphs": (32,), "glyphs110": (32,)}
# The least ε tried at which 80 % of the parameters of the digits' network go. Of the glyphs' all go at 12. It closes
# blocks as soon as it may, not one after the other, so on the digits it has a longer warm-up.
FIXED = {"digits": ("--epsilon_warmup_epochs", "8", "--epsilon", "2.5"), "glyphs": ("--epsilon", "6.0")}
# Epochs of warm-up and ramp besides the recipes': later on the digits, earlier on the glyphs.
OTHER_PACE = {
    "digits": ("--epsilon_warmup_epochs", "8", "--ramp_epochs", "25"),
    "glyphs": ("--epsilon_warmup_epochs", "8", "--ramp_epochs", "6"),
}
SMALLER_BUDGET = {"digits": ("--keep", "8"), "glyphs": ("--keep", "5", *OTHER_PACE["glyphs"])}  # the earlier on both
FINETUNED = {"digits": ("--ramp_epochs", "25")}  # with the recipe's 8 epochs it lost more on the digits
# Seeds and folds. Over the five folds each image of the digits is tested once; a few come first.
FEW = [(0, 0), (1, 1), (2, 2)]
# What the quick mode leaves out of the table takes half of its time.
SLOW = (
    "dense_without_side", "dense_with_as_many_epochs", "other_criterion", "budget_with_dense_compute", "other_pace",
    "other_pace_with_dense_compute", "smaller_budget", "scratch_with_dense_compute", "shallow_with_dense_compute",
    "stochastic_depth", "torch_pruning_to_latency",
)  # fmt: skip
PAIRS = {
    "digits": [*FEW, *((seed, fold) for seed in range(3) for fold in range(5) if seed != fold)],
    "glyphs": [(seed, 0) for seed in range(3)],
    "glyphs110": [(seed, 0) for seed in range(3)],
}
# The rows of a table, where it does not have all.
ROWS = {
    "glyphs110": (
        "dense", "budget", "budget_with_dense_compute", "scratch_with_dense_compute", "shallow",
        "shallow_with_dense_compute", "torch_pruning_to_size",
    ),
}  # fmt: skip

# What is changed, to which values; all else is the recipe of the digits. Restarts: the paper's, scaled to 60 epochs.
_STEPS = ("--lr_milestones", "20", "35", "50", "--lr_restart_milestones", "10", "18", "25")
SWEEPS: dict[str, dict[str, tuple[str, ...]]] = {
    "keep": {value: ("--keep", value) for value in ("0.05", "0.1", "0.15", "0.25", "0.35", "0.5", "0.75")},
    "epsilon": {value: (*FIXED["digits"][:-1], value) for value in ("1.0", "1.5", "2.0", "2.5", "3.0", "3.5")},
    "weight_decay": {value: ("--weight_decay", value) for value in ("1.25e-3", "2.5e-3", "5e-3", "1e-2")},
    "epsilon_warmup_epochs": {value: ("--epsilon_warmup_epochs", value) for value in ("0", "4", "8", "16")},
    "ramp_epochs": {value: ("--ramp_epochs", value) for value in ("0", "8", "25", "40")},
    "patience": {value: ("--patience", value) for value in ("1", "3", "6")},
    # 0.1 is what these networks have when nothing is said.
    "side_loss_weight": {"0": ("--side_loss_weight", "0"), "0.1": (), "0.3": ("--side_loss_weight", "0.3")},
    "learning rate, ε fixed": {
        "cosine": FIXED["digits"],
        "steps": (*FIXED["digits"], "--lr_scheduler", "multistep", *_STEPS[:4]),
        "steps, restarting": (*FIXED["digits"], "--lr_scheduler", "restarting", *_STEPS),
    },
}

# Are the glyphs hard enough to tell networks apart? Dense ones of three depths, and the small one trained for long.
DEPTHS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ResNet-20": ("glyphs", ("--architecture", "eps_resnet20")),
    "ResNet-56": ("glyphs", ()),
    "ResNet-110": ("glyphs110", ()),
    "ResNet-20, ten times as long": ("glyphs", ("--architecture", "eps_resnet20", "--num_train_epochs", "750")),
}


def recipe(data: str, *flags: str) -> argparse.Namespace:
    """What a run is trained by, from further arguments of train_hf.py on."""
    return parse_arguments([*FLAGS[data], *flags])


def table(data: str, pairs: list[tuple[int, int]]) -> list[Job]:
    """Every method, or those of the table's rows, for each seed and fold."""
    flags = {
        "fixed": FIXED,
        "other_criterion": {data: ("--criterion", next(name for name in CRITERIA if name != recipe(data).criterion))},
        "other_pace": OTHER_PACE,
        "other_pace_with_dense_compute": OTHER_PACE,
        "finetuned": FINETUNED,
        "smaller_budget": SMALLER_BUDGET,
    }
    rows = ROWS.get(data, METHODS)
    return [Job(data, method, *pair, flags.get(method, {}).get(data, ())) for method in rows for pair in pairs]


def length_of_epochs(data: str) -> str:
    """A sentence on the epochs of the recipe."""
    args = recipe(data)
    length = f"{args.steps_per_epoch} steps" if args.steps_per_epoch else "a pass through the training images"
    return f"An epoch is {length}, a batch {args.per_device_train_batch_size} images."


def small_table() -> list[Job]:
    """Of a few runs on the digits, without the slow methods."""
    return [job for job in table("digits", FEW) if job.method not in SLOW]


def latency_jobs(data: str) -> list[Job]:
    """The measurements of speed: of the first few seeds and folds."""
    return [Job(data, "latency", *pair) for pair in PAIRS[data][: len(FEW)]]


def sweep(values: dict[str, tuple[str, ...]]) -> dict[str, list[Job]]:
    """The runs of each value of one setting."""
    return {value: [setting(flags, *pair) for pair in FEW] for value, flags in values.items()}


def depths() -> dict[str, list[Job]]:
    """The dense networks on the glyphs; those of the recipes' depths are those of the tables."""
    return {name: [Job(data, "dense", *pair, flags) for pair in PAIRS[data]] for name, (data, flags) in DEPTHS.items()}


def swept(data: str) -> list[Job]:
    """All runs besides the table's: the settings on the digits, the depths on the glyphs."""
    if data == "digits":
        settings = [sweep(values) for values in SWEEPS.values()]
    else:
        settings = [depths()] if data == "glyphs" else []
    return [job for groups in settings for jobs in groups.values() for job in jobs]


def setting(flags: tuple[str, ...], seed: int, fold: int) -> Job:
    """A run on the digits; those of the table are not repeated under another name."""
    default, changed = recipe("digits"), recipe("digits", *flags)
    is_default = used_arguments(changed) == used_arguments(default)
    return Job("digits", "budget" if changed.epsilon is None else "fixed", seed, fold, () if is_default else flags)
