"""Checks of arguments that exclude or need each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...budget import BUDGETS
from .arguments import Arguments
from .groups import DataArguments

__all__ = ["check_directories", "check_pairs", "check_together"]

# Each option excludes the listed ones.
_EXCLUDED: dict[str, list[str]] = {
    **{name: [other for other in BUDGETS if other != name] for name in BUDGETS},
    "epsilon": [*BUDGETS],
    "no_gates": [*BUDGETS, "epsilon", "compare_dense"],
    "dataset_name": ["train_dir"],
    "per_pixel_mean": ["pretrained", "streaming"],
    "steps_per_epoch": ["streaming"],
    "model_name_or_path": ["architecture", "crop_pct", "model_args", "per_pixel_mean", "pretrained"],
}
# Each option needs the other one.
_NEEDED: dict[str, str] = {
    "dataset_config_name": "dataset_name",
    "test_split_name": "dataset_name",
    **dict.fromkeys(("validation_dir", "test_dir"), "train_dir"),
    "checkpoints_total_limit": "checkpointing_steps",
    **dict.fromkeys(("report_to", "logging_steps"), "with_tracking"),
    **dict.fromkeys(("hub_model_id", "hub_token", "hub_private_repo", "hub_revision"), "push_to_hub"),
}
# Each needs certain values of another option.
_FITTING: dict[str, tuple[str, list[str]]] = {
    "color_jitter": ("augmentation", ["resized_crop"]),
    "flip": ("augmentation", ["crop", "resized_crop"]),
    "per_pixel_mean": ("augmentation", ["crop", "distort"]),
    "nesterov": ("optimizer", ["sgd"]),
    "early_stopping_patience": ("eval_strategy", ["epoch"]),
}


def check_pairs(given: dict[str, Any]) -> None:
    """Check the given arguments, before defaults are filled in.

    Args:
        given: All arguments by name.

    Raises:
        ValueError: Two of them exclude each other, or one lacks another.
    """
    for name, excluded in _EXCLUDED.items():
        if given[name] and (clash := next((other for other in excluded if given[other]), None)):
            raise ValueError(f"--{name} and --{clash} exclude each other")
    for name, needed in _NEEDED.items():
        if given[name] and not given[needed]:
            raise ValueError(f"--{name} needs --{needed}")


def check_directories(given: DataArguments) -> None:
    """Check that the directories of images exist; the messages of datasets do not name them.

    Raises:
        ValueError: One does not exist.
    """
    for name in ("train_dir", "validation_dir", "test_dir"):
        path = getattr(given, name)
        if path is not None and not Path(path).is_dir():
            raise ValueError(f"--{name} {path} does not exist")


def check_together(args: Arguments) -> None:
    """Check arguments that must fit each other, after defaults are filled in.

    Raises:
        ValueError: Two of them do not fit.
    """
    model, pruning, teaching, training = args.model, args.pruning, args.distillation, args.training
    if training.cuda_graphs and training.gradient_accumulation_steps > 1:
        raise ValueError("--cuda_graphs needs --gradient_accumulation_steps 1")
    if args.paper.weight_decay_drop and args.paper.weight_decay_drop[0] < 1:
        raise ValueError(f"--weight_decay_drop: STEPS must be at least 1, got {args.paper.weight_decay_drop[0]:g}")
    flat = args.flat()
    for name, (of, fitting) in _FITTING.items():
        if flat[name] and flat[of] not in fitting:
            raise ValueError(f"--{name} needs --{of} {' or '.join(fitting)}")
    at_start = pruning.prune_at == "start"
    if at_start and not pruning.has_budget:
        raise ValueError("--prune_at start needs --keep or a target")
    if pruning.criterion != "response" and not pruning.has_budget:
        raise ValueError(f"--criterion {pruning.criterion} needs --keep or a target")
    if at_start and pruning.criterion == "importance":
        raise ValueError("--criterion importance needs --prune_at ramp: it is measured while a network trains")
    if training.num_train_epochs == 0 and not model.has_weights:
        raise ValueError("--num_train_epochs 0 needs --model_name_or_path: it prunes a network that is trained")
    if training.num_train_epochs == 0 and not at_start and not pruning.no_gates:
        raise ValueError("--num_train_epochs 0 needs --prune_at start")
    if teaching.dense_epochs and teaching.teacher != "self" and pruning.criterion != "leave_one_out":
        raise ValueError("--dense_epochs needs --teacher self or --criterion leave_one_out")
    for name in ("teacher_weight", "teacher_temperature"):
        if teaching.teacher and getattr(teaching, name) <= 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(teaching, name):g}")
