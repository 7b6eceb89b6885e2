"""Default values that depend on other arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...names import twin_name
from .arguments import Arguments
from .groups import PruningArguments

__all__ = ["fill_in"]


def fill_in(args: Arguments) -> None:
    """Fill in missing values: a pretrained network is fine-tuned, any other is trained from scratch."""
    model, data, pruning, training = args.model, args.data, args.pruning, args.training
    has_weights, has_threshold = model.has_weights, args.paper.epsilon is not None
    if not (pruning.has_budget or has_threshold or pruning.no_gates):
        pruning.keep = 0.25
    at_start = has_weights and not pruning.no_gates and not has_threshold
    fill(pruning, prune_at="start" if at_start else "ramp")
    fill(pruning, criterion="stage_ends" if pruning.prune_at == "start" else "response")
    rate = {"sgd": 0.1, "adamw": 0.001}[training.optimizer]
    if has_weights:
        fill(
            training, num_train_epochs=20, per_device_train_batch_size=32, learning_rate=rate * 0.1, weight_decay=1e-4,
            lr_decay_start=0.0,  # and --num_warmup_steps is a share of the steps, whose number depends on the data
        )  # fmt: skip
    else:
        fill(
            training, num_train_epochs=60, per_device_train_batch_size=128, learning_rate=rate, weight_decay=5e-3,
            lr_decay_start=0.3, num_warmup_steps=0,
        )  # fmt: skip
    fit_to_epochs(pruning, training.num_train_epochs, has_weights)
    if model.model_name_or_path is None:
        fill(model, architecture="eps_resnet110")
        model.architecture = twin_name(str(model.architecture))
    names = model.name, data.dataset_name or data.train_dir or "digits"
    fill(args, output_dir=str(Path("outputs") / "-".join(Path(name).name for name in names)))


def fill(group: Any, **values: Any) -> None:
    """Set those fields that are None."""
    for name, value in values.items():
        if getattr(group, name) is None:
            setattr(group, name, value)


def fit_to_epochs(pruning: PruningArguments, epochs: int, has_weights: bool) -> None:
    """Choose the warm-up and the ramp if they are not given, shorter ones for few epochs.

    For a pretrained network, all branches are open for 6 % of the epochs, and close during 24 %.
    """
    warmup, ramp = 4, 8
    if not pruning.no_gates and has_weights:
        warmup, ramp = max(1, round(0.06 * epochs)), max(1, round(0.24 * epochs))
    elif not pruning.no_gates and 4 + 8 + pruning.patience > epochs:
        warmup = max(1, epochs // 5)
        given = pruning.epsilon_warmup_epochs
        ramp = max(1, epochs // 2 - (warmup if given is None else given))
    fill(pruning, epsilon_warmup_epochs=warmup, ramp_epochs=ramp)
