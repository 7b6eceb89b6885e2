"""The choice of branches to remove before a training, by criterion and budget; and the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from transformers import AutoModelForImageClassification

from ..analysis.analyze import analyze
from ..analysis.report import Analysis
from ..budget import BUDGETS, Budget, TargetLatency, check_reachable
from ..criteria import Criterion, LeaveOneOut
from ..cutting.in_order import first_within
from ..cutting.prune import order_of
from ..hf.agreement import are_placeholders, differing_statistics
from ..surgery.branches import gates, timm_body
from ..surgery.removal import removed_slots
from .arguments import Arguments, PruningArguments

__all__ = [
    "ANALYSED", "Batches", "budget_of", "choose_by_loss", "choose_slots", "describe", "estimate_statistics",
    "load_teacher", "needs_analysis", "ramp_criterion",
]  # fmt: skip

# Number of training images for comparing branches: with a thousand, a rise of the loss of 0.01 is significant.
ANALYSED = 1024

Batches = Sequence[tuple[Tensor, Tensor]]


def budget_of(args: PruningArguments) -> Budget | None:
    """The budget; None with a fixed ε, or without gates."""
    for name, kind in BUDGETS.items():
        if (value := getattr(args, name)) is not None:
            return TargetLatency(value, args.latency_batch_size) if kind is TargetLatency else kind(value)
    return None


def needs_analysis(args: Arguments) -> bool:
    """Whether training images are needed to compare branches or to estimate BatchNorm's statistics."""
    pruning = args.pruning
    compares = pruning.criterion == "leave_one_out" or (pruning.prune_at, pruning.criterion) == ("start", "response")
    return args.dry_run or compares or args.training.num_train_epochs == 0


def ramp_criterion(name: str, batches: Batches) -> str | Criterion:
    """The criterion of a pruner."""
    return LeaveOneOut(batches) if name == "leave_one_out" else name


def choose_slots(
    args: PruningArguments, model: nn.Module, batches: Batches, record: Path | None = None, progress: bool = True
) -> list[str]:
    """The branches to remove before the training.

    Args:
        args: Arguments with a budget.
        model: Network by which branches are chosen.
        batches: Normalised training images and labels, on the model's device; unused by the orders
            ``stage_ends`` and ``last``.
        record: Path where ``--criterion leave_one_out`` writes its measurements, as JSON.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The network exceeds the budget even without any branch.
    """
    budget = budget_of(args)
    assert budget is not None, "checked with the arguments"
    if args.criterion == "leave_one_out":
        report = _analyze(args, model, batches, progress)
        if record:
            report.save(record)
        return choose_by_loss(model, report, budget)
    if args.criterion == "response":
        report = analyze(model, batches, batch_sizes=(), rerank=1, progress=progress)
        return first_within(model, {branch.slot: branch.response for branch in report.branches}, budget)
    return first_within(model, order_of(model, args.criterion), budget)


def _analyze(args: PruningArguments, model: nn.Module, batches: Batches, progress: bool) -> Analysis:
    return analyze(model, batches, batch_sizes=sorted({1, args.latency_batch_size}), progress=progress)


def choose_by_loss(model: nn.Module, report: Analysis, budget: Budget) -> list[str]:
    """The branches to remove for a budget, by the measured rises of the loss.

    Args:
        model: The analyzed network.
        report: Result of :func:`timm_eps.analyze`.
        budget: Size that the network may keep.
    """
    if budget.argument == "keep":  # a share of all branches of the architecture, as on the ramp
        return report.choose(keep=int(budget.goal(len(gates(model)) + len(removed_slots(model)))))
    return report.choose(budget=budget)


def describe(args: PruningArguments, model: nn.Module, batches: Batches, is_trained: bool) -> str:
    """The text of ``--dry_run``: a line for each branch, the size without all branches, and the branches to remove.

    Args:
        args: Arguments with a budget.
        model: Initial network of the training.
        batches: Images and labels, as for :func:`choose_slots`.
        is_trained: Whether its classifier has learnt the classes.
    """
    report = _analyze(args, model, batches, progress=True)
    lines = [str(report), ""]
    if not is_trained:
        lines += ["The classifier is new, so losses and accuracies above mean nothing; sizes and times do.", ""]
    lines.append(_limit(report))
    if (budget := budget_of(args)) is None:
        return "\n".join(lines)
    if args.prune_at == "ramp":
        _check_reachable(report, budget, args.latency_batch_size)
        lines.append("The target can be reached. The branches to remove are chosen during training.")
        return "\n".join(lines)
    kind = f"by {args.criterion}"
    if args.criterion == "leave_one_out":
        slots = choose_by_loss(model, report, budget)
        kind += "" if is_trained else ", or others after the dense network is trained"
    else:
        slots = choose_slots(args, model, batches, progress=False)
    lines.append(f"{budget} removes {len(slots)} branches, {kind}: {', '.join(slots) or 'none'}.")
    return "\n".join(lines)


def _limit(report: Analysis) -> str:
    dense, least = report.dense, report.curve[-1]
    times = "".join(
        f", {least.milliseconds[size] / dense.milliseconds[size]:.2f} of its time at batch {size}"
        for size in report.batch_sizes
    )
    return (
        f"Without all {len(report.branches)} branches the network has {least.parameters / dense.parameters:.2f} of its "
        f"parameters, {least.macs / dense.macs:.2f} of its multiply-adds{times}. No target can be below that."
    )


def _check_reachable(report: Analysis, budget: Budget, batch_size: int) -> None:
    dense, least = report.dense, report.curve[-1]
    left = {
        "keep": (dense.branches, 0),
        "target_params": (dense.parameters, least.parameters),
        "target_macs": (dense.macs, least.macs),
        "target_latency": (dense.milliseconds[batch_size], least.milliseconds[batch_size]),
    }
    check_reachable(budget, *left[budget.argument], len(report.branches))


def estimate_statistics(model: nn.Module, batches: Batches) -> bool:
    """Estimate the statistics of BatchNorm again, for pruning without training. Returns whether the model has any.

    Without some branches, the inputs of later layers have other means and variances than the stored ones.

    Args:
        model: A transformers model of this package.
        batches: Images and labels, as for :func:`choose_slots`.
    """
    body = timm_body(model)
    if not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for module in body.modules()):
        return False
    update_bn(batches, body)
    return True


def load_teacher(name: str, label_names: Sequence[str], pretrained_cfg: dict[str, Any]) -> nn.Module:
    """Load a saved model as a teacher.

    Args:
        name: Name on the Hub, or a directory.
        label_names: Class names of the student.
        pretrained_cfg: timm's description of the student's input.

    Raises:
        ValueError: The teacher has other classes, or its images are normalised differently.
    """
    teacher = AutoModelForImageClassification.from_pretrained(name)
    if teacher.config.num_labels != len(label_names):
        raise ValueError(
            f"--teacher {name} has {teacher.config.num_labels} classes, but the data set has {len(label_names)}. "
            "Fine-tune it on this data set first, or use --teacher self."
        )
    theirs = [teacher.config.id2label[number] for number in range(len(label_names))]
    if theirs != list(label_names) and not are_placeholders(theirs):
        raise ValueError(
            f"--teacher {name} has the classes {theirs[:5]}..., but the data set {list(label_names)[:5]}...."
        )
    own = getattr(teacher.config, "pretrained_cfg", None) or {}
    if field := differing_statistics(own, pretrained_cfg):
        raise ValueError(
            f"--teacher {name} needs images with {field} {[round(v, 4) for v in own[field]]}, the student "
            f"{[round(v, 4) for v in pretrained_cfg[field]]}. Use pretrained weights of the same kind for both."
        )
    return teacher.requires_grad_(False)
