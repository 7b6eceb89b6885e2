"""``timm-eps prune``: remove branches from a network, without training."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import add_budgets, add_images, arguments_of, prepare
from .networks import add_model, load_model
from .output import UsageError, add_json, answer, saved_percent, table

if TYPE_CHECKING:
    from torch import nn

    from ..training.arguments import Arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Remove residual branches and save the smaller network for fine-tuning."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.usage = "timm-eps prune MODEL (--slots SLOT ... | --keep X | --target_... X) --output_dir OUT"
    add_model(parser)
    how_much = add_budgets(parser, required=True)
    how_much.add_argument("--slots", nargs="+", metavar="SLOT", help="branches to remove, named as in analyze")
    parser.add_argument(
        "--criterion",
        choices=["leave_one_out", "response", "stage_ends", "last"],
        metavar="NAME",
        help="default leave_one_out (architecture: stage_ends); response; last",
    )
    parser.add_argument("--output_dir", required=True, metavar="OUT", help="directory for the smaller network")
    add_images(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Choose branches, remove them, save the network, and compare it with the original."""
    from .. import prune, save_pretrained
    from ..training.publishing import base_model

    given = _arguments(args)
    out = Path(args.output_dir)
    if out.resolve() == Path(args.model).resolve():
        raise ValueError(f"--output_dir {args.output_dir} is the directory of MODEL; take another one.")
    model, chosen, batches, is_trained = _load_and_choose(args, given)
    model.config.base_model = base_model(given.model) or model.config.base_model
    before = _copy(model)
    removed = prune(model, chosen)
    found: dict[str, Any] = {
        "output_dir": args.output_dir,
        "removed": removed,
        "not_removed": [slot for slot in chosen if slot not in removed],
        "criterion": given.pruning.criterion if args.slots is None else None,
        **_compare(before, model, args.latency_batch_size),
    }
    if is_trained:
        found |= _accuracies(before, model, batches)
    save_pretrained(model, out)
    found["fine_tune"] = shlex.join(_fine_tuning(args, is_trained))
    answer(args, found, _text(found))
    return 0


def _arguments(args: argparse.Namespace) -> Arguments:
    """Training arguments that would start with this pruning.

    Raises:
        UsageError: ``--criterion`` was given with ``--slots``.
    """
    if args.slots is not None and args.criterion:
        raise UsageError("--criterion needs --keep or a target")
    given = arguments_of(args)
    if not args.criterion:
        given.pruning.criterion = "leave_one_out" if given.model.model_name_or_path else "stage_ends"
    return given


def _load_and_choose(args: argparse.Namespace, given: Arguments) -> tuple[Any, list[str], list[Any], bool]:
    """The network, the slots to remove, the images, and whether the classifier is for their classes."""
    from ..criteria import ORDERS
    from ..training import choices

    if args.slots is not None:
        return load_model(given.model), args.slots, [], False
    if given.pruning.criterion in ORDERS:
        model = load_model(given.model)
        return model, choices.choose_slots(given.pruning, model, []), [], False
    prepared = prepare(given)
    if not prepared.is_trained and given.pruning.criterion == "leave_one_out":
        raise ValueError(
            "--criterion leave_one_out needs a classifier that was trained on the classes of the images. Fine-tune "
            "the network first, or use --criterion stage_ends."
        )
    record = Path(args.output_dir) / "branches.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    slots = choices.choose_slots(given.pruning, prepared.model, prepared.batches, record, progress=False)
    return prepared.model, slots, prepared.batches, prepared.is_trained


def _copy(model: Any) -> nn.Module:
    """A copy of the network that shares the weights."""
    from ..analysis.measure import gated_copy

    return gated_copy(model)


def _compare(before: nn.Module, model: Any, batch_size: int) -> dict[str, Any]:
    from ..analysis.measure import milliseconds, open_slots, size_of
    from ..report import hardware
    from ..surgery.branches import probe_batch, timm_body

    nets = {"before": before, "after": timm_body(model)}
    sizes = {name: size_of(net, tuple(probe_batch(net, 1).shape[1:])) for name, net in nets.items()}
    times = {size: milliseconds(nets, probe_batch(before, size)) for size in sorted({1, batch_size})}
    return {
        "branches": {name: len(open_slots(net)) for name, net in nets.items()},
        "parameters": {name: size.parameters for name, size in sizes.items()},
        "multiply_adds": {name: size.macs for name, size in sizes.items()},
        "milliseconds": times,
        "hardware": hardware(next(before.parameters()).device),
    }


def _accuracies(before: nn.Module, model: Any, batches: list[Any]) -> dict[str, Any]:
    from ..analysis.evaluation import evaluate, read_batches
    from ..surgery.branches import timm_body

    body: Any = timm_body(model)
    read = read_batches(batches, body.num_classes)
    scores = {"before": evaluate(before, read), "after": evaluate(body, read)}
    accuracy = {name: score.accuracy for name, score in scores.items()}
    return {"accuracy_without_training": accuracy, "images": scores["before"].images}


def _fine_tuning(args: argparse.Namespace, is_trained: bool) -> list[str]:
    """The command that fine-tunes the saved network. The original network is the teacher if it knows the classes."""
    words = ["timm-eps", "train", "--model_name_or_path", args.output_dir, "--no_gates"]
    for name in ("dataset_name", "dataset_config_name", "train_dir", "image_column_name", "label_column_name"):
        if value := getattr(args, name):
            words += [f"--{name}", value]
    if is_trained:
        words += ["--teacher", args.model]
    return [*words, "--output_dir", f"{args.output_dir.rstrip('/')}-tuned"]


def _text(found: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("", "before", "after", "saved")]
    for name in ("branches", "parameters", "multiply_adds"):
        rows.append(_row(name.replace("_", "-"), found[name], "{:,}"))
    for size, times in found["milliseconds"].items():
        rows.append(_row(f"ms at batch {size}", times, "{:,.2f}"))
    lines = [*table(rows), f"times on {found['hardware']}", ""]
    if accuracy := found.get("accuracy_without_training"):
        before, after = (f"{100 * accuracy[name]:.2f} %" for name in ("before", "after"))
        lines.append(
            f"Accuracy on {found['images']:,} training images, not fine-tuned: {before} before, {after} after."
        )
    lines.append(f"Removed: {', '.join(found['removed']) or 'none'}")
    if found["not_removed"]:
        lines.append(f"Not removed, as the output would change: {', '.join(found['not_removed'])}")
    return "\n".join([*lines, f"Saved in {found['output_dir']}. Now fine-tune it:", f"  {found['fine_tune']}"])


def _row(name: str, values: dict[str, float], form: str) -> tuple[str, ...]:
    before, after = values["before"], values["after"]
    return name, form.format(before), form.format(after), f"{saved_percent(before, after):.1f} %"
