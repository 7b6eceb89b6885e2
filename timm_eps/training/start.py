"""What a training begins with: which branches are removed before it, by which criterion, and who teaches."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from transformers import AutoConfig, AutoModelForImageClassification

from ..analysis.analyze import analyze
from ..analysis.measure import gated_copy, open_slots
from ..analysis.report import Analysis
from ..budget import BUDGETS, Budget, TargetLatency, check_reachable
from ..criteria import Criterion, LeaveOneOut, last_first
from ..surgery.branches import timm_body
from ..surgery.removal import removed_slots
from .ordered import first_within

__all__ = [
    "ANALYSED", "Batches", "budget_of", "choose_slots", "dense_epochs", "describe", "estimate_statistics",
    "knows_classes", "load_teacher", "needs_analysis", "needs_trained_classifier", "ramp_criterion",
]  # fmt: skip

# Training images on which branches are compared: at a thousand, a rise of the loss of 0.01 is told from none.
ANALYSED = 1024

Batches = Sequence[tuple[Tensor, Tensor]]


def budget_of(args: argparse.Namespace) -> Budget | None:
    """What may stay; None with a fixed ε, or without gates."""
    for name, kind in BUDGETS.items():
        if (value := getattr(args, name)) is not None:
            return TargetLatency(value, args.latency_batch_size) if kind is TargetLatency else kind(value)
    return None


def needs_analysis(args: argparse.Namespace) -> bool:
    """Whether branches are compared on training images, or BatchNorm's statistics are taken on them."""
    compares = args.criterion == "leave_one_out" or (args.prune_at, args.criterion) == ("start", "response")
    return args.dry_run or compares or args.num_train_epochs == 0


def needs_trained_classifier(args: argparse.Namespace) -> bool:
    """Whether the dense network must have learnt the classes before the training begins."""
    return args.teacher == "self" or (args.prune_at, args.criterion) == ("start", "leave_one_out")


def knows_classes(args: argparse.Namespace, splits: Mapping[str, Any]) -> bool:
    """Whether the network has a classifier that was saved with it, for the classes of the data set."""
    if not args.model_name_or_path:
        return False
    stored = AutoConfig.from_pretrained(args.model_name_or_path)
    return stored.num_labels == len(splits["train"].label_names)


def dense_epochs(args: argparse.Namespace, is_trained: bool) -> int:
    """For how many epochs the dense network is fine-tuned first.

    Args:
        args: Of the command line.
        is_trained: Whether its classifier has learnt the classes, as :func:`knows_classes` says.

    Raises:
        ValueError: It has not, and no epochs are asked for.
    """
    if not needs_trained_classifier(args):
        return 0
    if args.dense_epochs is not None:
        return args.dense_epochs
    if is_trained:
        return 0
    if not args.num_train_epochs:
        raise ValueError("The classifier is new, and --num_train_epochs 0 leaves it so; give --dense_epochs.")
    return args.num_train_epochs


def ramp_criterion(args: argparse.Namespace, batches: Batches) -> str | Criterion:
    """The criterion of a pruner."""
    return LeaveOneOut(batches) if args.criterion == "leave_one_out" else args.criterion


def choose_slots(args: argparse.Namespace, model: nn.Module, batches: Batches, progress: bool = True) -> list[str]:
    """The branches to remove before the training.

    Args:
        args: Of the command line, with a budget.
        model: The network to choose by.
        batches: Normalised training images and labels, on the model's device; unused by ``--criterion last``.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The network exceeds the budget even without any branch.
    """
    budget = budget_of(args)
    assert budget is not None, "checked with the arguments"
    if args.criterion == "leave_one_out":
        report = _analyze(args, model, batches, progress)
        report.save(Path(args.output_dir) / "branches.json")
        return _chosen(args, model, report, budget)
    if args.criterion == "response":
        report = analyze(model, batches, batch_sizes=(), rerank=1, progress=progress)
        return first_within(model, {branch.slot: branch.response for branch in report.branches}, budget)
    return first_within(model, last_first(open_slots(gated_copy(model))), budget)


def _analyze(args: argparse.Namespace, model: nn.Module, batches: Batches, progress: bool) -> Analysis:
    return analyze(model, batches, batch_sizes=sorted({1, args.latency_batch_size}), progress=progress)


def _chosen(args: argparse.Namespace, model: nn.Module, report: Analysis, budget: Budget) -> list[str]:
    if budget.argument == "keep":  # of the branches that the architecture has, as on the ramp
        total = len(report.branches) + len(removed_slots(model))
        return report.choose(keep=int(budget.goal(total)))
    size = {"batch_size": args.latency_batch_size} if isinstance(budget, TargetLatency) else {}
    return report.choose(**{budget.argument: budget.value}, **size)  # type: ignore[arg-type]


def describe(args: argparse.Namespace, model: nn.Module, batches: Batches, is_trained: bool) -> str:
    """What ``--dry_run`` prints: a line for each branch, what is left without all of them, and what would be removed.

    Args:
        args: Of the command line.
        model: The network that the training would begin with.
        batches: As for :func:`choose_slots`.
        is_trained: Whether its classifier has learnt the classes.
    """
    report = _analyze(args, model, batches, progress=True)
    dense, least = report.dense, report.curve[-1]
    lines = [str(report), ""]
    if not is_trained:
        lines += ["The classifier is new, so the losses and accuracies above say nothing yet; sizes and times do.", ""]
    times = "".join(
        f", {least.milliseconds[size] / dense.milliseconds[size]:.2f} of its time at batch {size}"
        for size in report.batch_sizes
    )
    lines.append(
        f"Without all {len(report.branches)} branches the network has {least.parameters / dense.parameters:.2f} of its "
        f"parameters, {least.macs / dense.macs:.2f} of its multiply-adds{times}. No target can be below that."
    )
    if (budget := budget_of(args)) is None:
        return "\n".join(lines)
    if args.prune_at == "ramp":
        left = {
            "keep": (dense.branches, 0),
            "target_params": (dense.parameters, least.parameters),
            "target_macs": (dense.macs, least.macs),
            "target_latency": (
                dense.milliseconds[args.latency_batch_size],
                least.milliseconds[args.latency_batch_size],
            ),
        }
        check_reachable(budget, *left[budget.argument], len(report.branches))
        lines.append(f"{budget} can be reached; which branches go is decided while the network trains.")
        return "\n".join(lines)
    if args.criterion == "leave_one_out":
        slots = _chosen(args, model, report, budget)
        kind = (
            "by leave_one_out" if is_trained else "by leave_one_out, once the dense network is trained, if not others"
        )
    else:
        slots, kind = choose_slots(args, model, batches, progress=False), f"by {args.criterion}"
    lines.append(f"{budget} removes {len(slots)} branches, {kind}: {', '.join(slots) or 'none'}.")
    return "\n".join(lines)


def estimate_statistics(model: nn.Module, batches: Batches) -> bool:
    """Take the statistics of BatchNorm anew, for a cut that no training follows. Returns whether there are any.

    Without some branches the next layers read other means and variances than those that were stored.

    Args:
        model: A transformers model of this package.
        batches: As for :func:`choose_slots`.
    """
    body = timm_body(model)
    if not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for module in body.modules()):
        return False
    update_bn(batches, body)
    return True


def load_teacher(name: str, label_names: Sequence[str], pretrained_cfg: dict[str, Any]) -> nn.Module:
    """A saved model that teaches.

    Args:
        name: On the Hub, or a directory.
        label_names: The classes of the student.
        pretrained_cfg: timm's description of the student's input.

    Raises:
        ValueError: It has other classes, or reads images that are normalised otherwise.
    """
    teacher = AutoModelForImageClassification.from_pretrained(name)
    if teacher.config.num_labels != len(label_names):
        raise ValueError(
            f"--teacher {name} has {teacher.config.num_labels} classes, the data set has {len(label_names)}. Fine-tune "
            "it on this data set first; --teacher self does so with the network that is trained."
        )
    theirs = [teacher.config.id2label[number] for number in range(len(label_names))]
    if theirs != list(label_names) and theirs != [f"LABEL_{number}" for number in range(len(label_names))]:
        raise ValueError(f"--teacher {name} has the classes {theirs[:5]}..., the data set {list(label_names)[:5]}....")
    own = getattr(teacher.config, "pretrained_cfg", None) or {}
    for field in ("mean", "std"):
        if own.get(field) is not None and not torch.allclose(
            torch.tensor(own[field]), torch.tensor(pretrained_cfg[field]), atol=1e-3
        ):
            raise ValueError(
                f"--teacher {name} reads images with {field} {[round(v, 4) for v in own[field]]}, the student with "
                f"{[round(v, 4) for v in pretrained_cfg[field]]}. Train both from weights of one kind."
            )
    return teacher.requires_grad_(False)
