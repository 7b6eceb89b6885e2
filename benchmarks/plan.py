"""The runs of each comparison."""

from __future__ import annotations

from benchmarks.comparisons import COMPARISONS, FEW
from benchmarks.jobs import Job
from benchmarks.methods import METHODS
from timm_eps.training.arguments import used_arguments

# The methods without which the quick mode takes less than a third of the time.
SLOW = (
    "dense_without_side", "dense_with_as_many_epochs", "other_criterion", "budget_with_dense_compute", "other_pace",
    "other_pace_with_dense_compute", "smaller_budget", "scratch_with_dense_compute", "shallow_with_dense_compute",
    "finetuned", "stochastic_depth", "torch_pruning_to_latency",
)  # fmt: skip

# Changed settings with their values; all other settings follow the recipe of the digits. The restarts are the paper's,
# scaled to 60 epochs.
_FIXED = COMPARISONS["digits"].changed["fixed"]
_STEPS = ("--lr_milestones", "20", "35", "50", "--lr_restart_milestones", "10", "18", "25")
SWEEPS: dict[str, dict[str, tuple[str, ...]]] = {
    "keep": {value: ("--keep", value) for value in ("0.05", "0.1", "0.15", "0.25", "0.35", "0.5", "0.75")},
    "epsilon": {value: (*_FIXED[:-1], value) for value in ("1.0", "1.5", "2.0", "2.5", "3.0", "3.5")},
    "weight_decay": {value: ("--weight_decay", value) for value in ("1.25e-3", "2.5e-3", "5e-3", "1e-2")},
    "epsilon_warmup_epochs": {value: ("--epsilon_warmup_epochs", value) for value in ("0", "4", "8", "16")},
    "ramp_epochs": {value: ("--ramp_epochs", value) for value in ("0", "8", "25", "40")},
    "patience": {value: ("--patience", value) for value in ("1", "3", "6")},
    # 0.1 is the default of these networks.
    "side_loss_weight": {"0": ("--side_loss_weight", "0"), "0.1": (), "0.3": ("--side_loss_weight", "0.3")},
    "learning rate, ε fixed": {
        "cosine": _FIXED,
        "steps": (*_FIXED, "--lr_scheduler", "multistep", *_STEPS[:4]),
        "steps, restarting": (*_FIXED, "--lr_scheduler", "restarting", *_STEPS),
    },
}

# Dense networks of three depths, and a small one with a long training. They show whether depth helps on the glyphs.
DEPTHS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ResNet-20": ("glyphs", ("--architecture", "eps_resnet20")),
    "ResNet-56": ("glyphs", ()),
    "ResNet-110": ("glyphs110", ()),
    "ResNet-20, ten times as long": ("glyphs", ("--architecture", "eps_resnet20", "--num_train_epochs", "750")),
}


def table(data: str, pairs: list[tuple[int, int]] | None = None) -> list[Job]:
    """Every method of the table for each seed and fold: all of the comparison, or the given pairs."""
    compared = COMPARISONS[data]
    return [
        Job(data, method, *pair, compared.changed.get(method, ()))
        for method in compared.rows or METHODS
        for pair in pairs or compared.pairs
    ]


def small_table() -> list[Job]:
    """A few runs on the digits, without the slow methods."""
    return [job for job in table("digits", FEW) if job.method not in SLOW]


def latency_jobs(data: str) -> list[Job]:
    """The latency measurements, on the first few seeds and folds."""
    return [Job(data, "latency", *pair) for pair in COMPARISONS[data].pairs[: len(FEW)]]


def sweep(values: dict[str, tuple[str, ...]]) -> dict[str, list[Job]]:
    """The runs of each value of one setting."""
    return {value: [setting(flags, *pair) for pair in FEW] for value, flags in values.items()}


def depths() -> dict[str, list[Job]]:
    """The dense networks on the glyphs. The depths of the recipes share their runs with the tables."""
    return {
        name: [Job(data, "dense", *pair, flags) for pair in COMPARISONS[data].pairs]
        for name, (data, flags) in DEPTHS.items()
    }


def swept(data: str) -> list[Job]:
    """All runs outside the tables: settings on the digits, depths on the glyphs."""
    if data == "digits":
        settings = [sweep(values) for values in SWEEPS.values()]
    else:
        settings = [depths()] if data == "glyphs" else []
    return [job for groups in settings for jobs in groups.values() for job in jobs]


def setting(flags: tuple[str, ...], seed: int, fold: int) -> Job:
    """A run on the digits. A run of the table is not repeated under another name."""
    recipe = COMPARISONS["digits"].recipe
    changed = recipe(*flags)
    is_default = used_arguments(changed) == used_arguments(recipe())
    return Job(
        "digits", "budget" if changed.paper.epsilon is None else "fixed", seed, fold, () if is_default else flags
    )
