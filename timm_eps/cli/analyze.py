"""``timm-eps analyze``: effect on the loss and cost of each branch."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from .images import add_budgets, add_images, arguments_of, prepare
from .networks import add_model
from .output import add_json, answer

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Measure each residual branch: effect on the loss, and cost. Nothing is trained."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.usage = "timm-eps analyze MODEL [--dataset_name NAME | --train_dir DIR] [options]"
    add_model(parser)
    add_images(parser)
    add_budgets(parser)
    parser.add_argument("--output", metavar="JSON", help="file for the report, which Analysis.load reads")
    parser.add_argument("--plot", metavar="PNG", help="file for a plot of cost against loss, one point per branch")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Analyze the network, write the requested files, and print the table and the choice."""
    from .. import analyze
    from ..training import choices

    given = arguments_of(args, criterion="leave_one_out")
    prepared = prepare(given)
    sizes = sorted({1, args.latency_batch_size})
    report = analyze(prepared.model, prepared.batches, batch_sizes=sizes, progress=sys.stderr.isatty())
    if args.output:
        report.save(args.output)
    if args.plot:
        report.plot(args.plot)
    found: dict[str, Any] = {"report": report.to_dict(), "dataset": prepared.dataset, "is_trained": prepared.is_trained}
    lines = [f"images of {prepared.dataset}", str(report)]
    if not prepared.is_trained:
        lines += ["", "The classifier is new: losses, accuracies and a choice by them say nothing. Sizes and times do."]
    if (budget := choices.budget_of(given.pruning)) is not None:
        slots = choices.choose_by_loss(prepared.model, report, budget)
        found["choice"] = {"budget": {budget.argument: budget.value}, "slots": slots}
        lines += ["", f"--{budget.argument} {budget.value} removes {len(slots)} branches."]
        if slots:
            pretrained = ["--pretrained"] if args.pretrained else []
            command = ["timm-eps", "prune", args.model, *pretrained, "--output_dir", "OUT", "--slots", *slots]
            lines += ["To remove them:", f"  {shlex.join(command)}"]
    answer(args, found, "\n".join(lines))
    return 0
