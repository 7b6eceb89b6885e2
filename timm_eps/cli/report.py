"""``timm-eps report``: write one HTML file that shows a saved network."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..training.arguments import DataArguments
from .images import SHOWN
from .output import add_json, answer, size_text
from .push import read_results

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Write one HTML file that shows the removed branches and their effects."

# The data arguments that matter for evaluation. The others augment or order training images.
_READ = (
    "dataset_name", "dataset_config_name", "train_dir", "validation_dir", "test_dir", "train_split_name",
    "test_split_name", "train_val_split", "image_column_name", "label_column_name", "max_eval_samples", "streaming",
    "corrupt_images", "image_size", "fold", "dataloader_num_workers",
)  # fmt: skip
_ANALYZED = 1024  # images; enough to measure a rise of the loss by 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.usage = "timm-eps report DIRECTORY [--digits | --dataset_name NAME | --train_dir DIR] [options]"
    parser.add_argument("directory", metavar="DIRECTORY", help="directory of a saved network")
    parser.add_argument("--output", metavar="HTML", help="file to write; default DIRECTORY/report.html")
    parser.add_argument("--dense", metavar="PATH|ID", help="dense network to compare answers with, on the images below")
    parser.add_argument(
        "--analyze", action="store_true", help="measure the effect on the loss and the cost of each branch of --dense"
    )
    parser.add_argument("--measure", action="store_true", help="measure the latency now: eager, and ONNX Runtime")
    parser.add_argument("--compile", action="store_true", help="with --measure: torch.compile as well")
    parser.add_argument(
        "--latency_batch_size", type=int, nargs="+", default=[1, 32], metavar="N", help="with --measure: batch sizes"
    )
    parser.add_argument("--device", default="cpu", help="device of the networks; default cpu")
    parser.add_argument("--digits", action="store_true", help="images: scikit-learn's digits")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of the held-out training images; default: the run's"
    )
    for each in fields(DataArguments):
        if each.name in _READ:
            shown: dict[str, Any] = {"help": argparse.SUPPRESS}
            if each.name in SHOWN or each.name == "validation_dir":
                metavar, text = SHOWN.get(each.name, ("DIR", "directory of the evaluation images"))
                shown = {"metavar": metavar, "help": f"images: {text}"}
            parser.add_argument(f"--{each.name}", **{**each.metadata, **shown})
    add_json(parser)
    parser.description = f"{HELP} The other data flags of `timm-eps train` work, too."


def run(args: argparse.Namespace) -> int:
    """Write the page. Returns the exit code.

    Raises:
        ValueError: An argument needs another one, or a file is invalid.
        OSError: A file or the Hub cannot be reached.
    """
    from transformers import logging

    from ..page.writing import write_page

    has_images = bool(args.digits or args.dataset_name or args.train_dir)
    _check(args, has_images)
    logging.disable_progress_bar()
    path = write_page(
        args.directory,
        args.output,
        dense=args.dense,
        device=args.device,
        latency_batch_sizes=args.latency_batch_size if args.measure else (),
        compiled=args.compile,
        **(_images(args) if has_images else {}),
    )
    size = path.stat().st_size
    answer(args, {"page": str(path), "bytes": size}, f"Wrote {path} ({size_text(size)}).")
    return 0


def _check(args: argparse.Namespace, has_images: bool) -> None:
    if args.digits and (args.dataset_name or args.train_dir):
        raise ValueError("--digits excludes --dataset_name and --train_dir")
    for name in ("dense", "seed", "max_eval_samples"):
        if getattr(args, name) is not None and not has_images:
            raise ValueError(f"--{name} needs images: --dataset_name, --train_dir or --digits")
    if args.analyze and not args.dense:
        raise ValueError("--analyze needs --dense, the network that still has its branches")
    if args.compile and not args.measure:
        raise ValueError("--compile needs --measure")


def _images(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``write_page`` that depend on images."""
    from ..training.evaluation_images import EvaluationImages, data_arguments

    of_run = _results(args.directory)
    seed = args.seed if args.seed is not None else of_run.get("seed", 0)
    given = {name: getattr(args, name) for name in _READ}
    arguments = data_arguments(given, args.directory, seed if isinstance(seed, int) else 0)
    images = EvaluationImages.load(arguments)
    ran_on = of_run.get("dataset"), of_run.get("eval_split")
    if ran_on[0] == images.dataset and ran_on[1] != images.name and not (args.test_dir or args.test_split_name):
        print(
            f"Note: the run evaluated on {str(ran_on[1])[:100]!r}, this page on {images.name!r}. If the network was "
            "trained on some of these images, the page shows too good an accuracy."
        )
    found: dict[str, Any] = {"batches": images.batches(), "images_name": f"{images.dataset}, {images.name}"}
    if args.analyze:
        found["analysis"] = _analysis(args, EvaluationImages.load(arguments, _ANALYZED))
    return found


def _analysis(args: argparse.Namespace, images: Any) -> Any:
    from transformers import AutoModelForImageClassification

    from ..analysis.analyze import analyze

    dense = AutoModelForImageClassification.from_pretrained(args.dense).to(args.device).eval()
    return analyze(dense, images.batches(), progress=True)


def _results(directory: str) -> dict[str, Any]:
    """The results of the run, which ``write_page`` checks; empty if they cannot be read."""
    try:
        return read_results(Path(directory)) or {}
    except (OSError, ValueError):
        return {}
