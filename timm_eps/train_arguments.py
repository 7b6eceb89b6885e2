"""The arguments of ``train_hf.py``: on the command line, in a configuration file, and in the record of a run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .pruner import CRITERIA

__all__ = ["binding_arguments", "hub_id", "on_digits", "parse_arguments", "used_arguments"]


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The arguments of a run, checked as far as they can be without data and model. Exits with a message if wrong."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="JSON file with arguments by name; flags on the command line win over it")
    model = parser.add_argument_group("model").add_argument
    model("--architecture", help="a model this package registers with timm; default eps_resnet110")
    model("--pretrained", action="store_true", help="begin with timm's weights; eps_resnet50.a1_in1k names a tag")
    model("--model_args", type=json_object, help='JSON with keyword arguments for timm, such as {"drop_rate": 0.1}')
    model("--model_name_or_path", help="a saved model, on the Hub or a directory, to go on from")
    model("--ignore_mismatched_sizes", action="store_true", help="new classifier where the saved one does not fit")
    source = parser.add_argument_group("data (without any of these: scikit-learn's digits)").add_argument
    source("--dataset_name", help="a data set on the Hub, or a directory that datasets.load_dataset reads")
    source("--dataset_config_name")
    source("--train_dir", help="a directory with one sub-directory of images a class")
    source("--validation_dir")
    source("--train_split_name", default="train", help="or several, such as train+extra")
    source("--train_val_split", type=share, default=0.15, help="share to validate on if there is no such split")
    source("--image_column_name", help="found by type if not given; images, encoded files or paths")
    source("--label_column_name", help="found by type if not given; classes, strings or whole numbers")
    source("--max_train_samples", type=at_least(1), help="draw this many; of a stream, make so many an epoch")
    source("--max_eval_samples", type=at_least(1), help="draw this many; of a stream, the first ones")
    source("--streaming", action="store_true", help="read images as they come, for data that do not fit the disk")
    source("--shuffle_buffer_size", type=at_least(1), default=1000, help="of a stream: draw the next of so many images")
    source(
        "--corrupt_images", choices=["error", "skip"], default="error", help="skip: leave them out, count and name them"
    )
    source("--image_size", type=at_least(4), help="side in pixels; default that of the architecture, digits 8")
    source("--fold", type=int, default=0, help="which fifth of the digits to validate on, 0 to 4")
    source(
        "--augmentation",
        choices=["crop", "distort", "resized_crop"],
        default="crop",
        help="crop: after padding; distort: the paper's for SVHN; resized_crop: for large images, read when needed",
    )
    source("--padding", type=at_least(0), help="of crop and distort, pixels on each side; default size // 8")
    source("--color_jitter", type=finite, nargs=3, help="of resized_crop: brightness, contrast and saturation")
    source("--flip", action="store_true", help="mirror half the images; not for digits")
    source("--crop_pct", type=share, help="share of the side that the centre crop for evaluation leaves")
    source(
        "--per_pixel_mean",
        action="store_true",
        help="the paper's for CIFAR: the network takes off the mean of each pixel, not only of each channel",
    )
    source("--dataloader_num_workers", type=at_least(0), default=0, help="processes that read large images")
    gate = parser.add_argument_group("gates").add_argument
    gate("--keep", type=fraction_or_number, help="share (0.25) or number (14) of branches to keep; default 0.25")
    gate("--epsilon", type=finite, help="the paper's fixed threshold instead of --keep")
    gate("--no_gates", action="store_true", help="train the dense network only")
    gate("--epsilon_warmup_epochs", type=at_least(0), default=4, help="epochs with all gates open first")
    gate("--ramp_epochs", type=at_least(0), default=8, help="with --keep: epochs from there to the full budget")
    gate(
        "--criterion",
        choices=CRITERIA,
        default="response",
        help="with --keep: which branches close first, by their response or by what the loss would change without them",
    )
    gate("--patience", type=at_least(1), default=3, help="epochs in a row a block is closed before it is removed")
    gate("--no_live_removal", action="store_true", help="remove closed blocks at the end, not during training")
    gate("--side_loss_weight", type=finite, help="weight of the side head's loss; default 0.1 for CIFAR networks")
    train = parser.add_argument_group("training").add_argument
    train("--num_train_epochs", type=at_least(1), default=60)
    train(
        "--steps_per_epoch",
        type=at_least(1),
        help="an epoch is so many steps of the optimizer, not a pass through the images; all that goes by epochs does",
    )
    train("--eval_strategy", choices=["epoch", "no"], default="epoch", help="no: test the final network only")
    train("--per_device_train_batch_size", type=at_least(2), default=128)
    train("--per_device_eval_batch_size", type=at_least(1), default=512)
    train("--gradient_accumulation_steps", type=at_least(1), default=1)
    train("--optimizer", choices=["sgd", "adamw"], default="sgd", help="adamw: try a --learning_rate near 1e-3")
    train("--learning_rate", type=float, default=0.1)
    train("--momentum", type=finite, default=0.9, help="of sgd")
    train("--nesterov", action="store_true", help="of sgd")
    train("--weight_decay", type=finite, default=5e-3)
    train("--weight_decay_drop", type=finite, nargs=2, metavar=("STEPS", "FACTOR"), help="multiply it every so often")
    train(
        "--lr_scheduler",
        choices=["cosine", "multistep", "restarting"],
        default="cosine",
        help="restarting is the paper's for small images, multistep that for ImageNet",
    )
    train("--num_warmup_steps", type=at_least(0), default=0, help="with cosine: steps of rising rate first")
    train("--lr_decay_start", type=share, default=0.3, help="with cosine: share of the training at full rate first")
    epochs: dict[str, Any] = {"type": at_least(1), "nargs": "+"}
    train("--lr_milestones", **epochs, default=[82, 123, 300], help="not with cosine: epochs at which the rate falls")
    train("--lr_restart_milestones", **epochs, default=[41, 61, 150], help="the same, counted from a restart")
    train("--lr_factors", type=finite, nargs="+", default=[1, 0.1, 0.01, 0.002], help="of the rate, between them")
    train("--num_threads", type=at_least(1), help="on the CPU, of each process; default: all cores, divided")
    train("--compile", action="store_true", help="by torch.compile; compiles anew after each removal")
    train("--cuda_graphs", action="store_true", help="start a step's kernels all at once: deep networks train faster")
    train("--channels_last", action="store_true", help="the memory format that accelerators prefer")
    train("--sync_batchnorm", action="store_true", help="batch norm over the batches of all processes")
    train("--seed", type=int, default=0)
    train("--compare_dense", action="store_true", help="train the same recipe with the gates off as well")
    parser.add_argument("--output_dir", help="default outputs/<architecture>-<data set>")
    going_on = parser.add_argument_group("checkpoints and tracking").add_argument
    going_on("--checkpointing_steps", type=steps_or_epoch, help="a number of steps, or 'epoch'; default: none")
    going_on("--checkpoints_total_limit", type=at_least(1), help="keep only the last ones")
    going_on(
        "--resume_from_checkpoint",
        nargs="?",
        const="latest",
        help="a checkpoint's directory, or 'latest' in --output_dir; begins anew if there is none",
    )
    going_on("--with_tracking", action="store_true", help="log to the trackers of --report_to")
    going_on("--report_to", nargs="+", help="tensorboard, wandb, comet_ml, ...; default all that are installed")
    going_on("--logging_steps", type=at_least(1), help="also log the loss every so many steps, not only each epoch")
    saving = parser.add_argument_group("saving and the Hub").add_argument
    saving("--with_remote_code", action="store_true", help="add code to load a CIFAR network without this package")
    saving("--with_onnx", action="store_true", help="add onnx/model.onnx")
    saving("--license", default="apache-2.0", help="of the weights, for the card")
    saving("--push_to_hub", action="store_true", help="push what is in --output_dir, in one commit")
    saving("--hub_model_id", help="owner/name; default the name of --output_dir, under your own")
    saving("--hub_token", help="default: the one that `hf auth login` stored")
    saving("--hub_private_repo", action="store_true", help="if the repository is made now")
    saving("--hub_revision", help="the branch to push to; default main")

    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    args = parser.parse_args([*read_config(given), *argv]) if given.config else given
    for flag, excluded in {
        "epsilon": ["keep"],
        "cuda_graphs": ["compile"],
        "no_gates": ["keep", "epsilon", "compare_dense"],
        "dataset_name": ["train_dir"],
        "per_pixel_mean": ["pretrained", "streaming"],
        "steps_per_epoch": ["streaming"],
        "model_name_or_path": ["architecture", "crop_pct", "image_size", "model_args", "per_pixel_mean", "pretrained"],
    }.items():
        if getattr(args, flag) and (clash := next((name for name in excluded if getattr(args, name)), None)):
            parser.error(f"--{flag} and --{clash} exclude each other")
    for flag, needed in {
        "dataset_config_name": "dataset_name",
        "validation_dir": "train_dir",
        "checkpoints_total_limit": "checkpointing_steps",
        **dict.fromkeys(("report_to", "logging_steps"), "with_tracking"),
        **dict.fromkeys(("hub_model_id", "hub_token", "hub_private_repo", "hub_revision"), "push_to_hub"),
    }.items():
        if getattr(args, flag) and not getattr(args, needed):
            parser.error(f"--{flag} goes with --{needed}")
    if args.cuda_graphs and args.gradient_accumulation_steps > 1:
        parser.error("--cuda_graphs goes with --gradient_accumulation_steps 1")
    if args.weight_decay_drop and args.weight_decay_drop[0] < 1:
        parser.error(f"--weight_decay_drop: STEPS must be at least 1, got {args.weight_decay_drop[0]:g}")
    for flag, option, fitting in (
        ("color_jitter", "augmentation", ["resized_crop"]),
        ("flip", "augmentation", ["crop", "resized_crop"]),
        ("per_pixel_mean", "augmentation", ["crop", "distort"]),
        ("nesterov", "optimizer", ["sgd"]),
    ):
        if getattr(args, flag) and getattr(args, option) not in fitting:
            parser.error(f"--{flag} goes with --{option} {' or '.join(fitting)}")
    if args.keep is None and args.epsilon is None and not args.no_gates:
        args.keep = 0.25
    if args.criterion != "response" and args.keep is None:
        parser.error(f"--criterion {args.criterion} goes with --keep")
    if args.model_name_or_path is None and args.architecture is None:
        args.architecture = "eps_resnet110"
    if args.output_dir is None:
        names = args.model_name_or_path or args.architecture, args.dataset_name or args.train_dir or "digits"
        args.output_dir = str(Path("outputs") / "-".join(Path(name).name for name in names))
    return args


def fraction_or_number(text: str) -> float | int:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def steps_or_epoch(text: str) -> int | str:
    return text if text == "epoch" else at_least(1)(text)


def share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return whole_number


def read_config(given: argparse.Namespace) -> list[str]:
    """The arguments in a configuration file, as they would stand on the command line, less those that flags replace."""
    path = given.config
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {path} is not JSON: {error}.") from error
    if not isinstance(stored, dict):
        raise ValueError(f"--config {path} must hold an object of arguments by name, not a {type(stored).__name__}.")
    if unknown := sorted(stored.keys() - vars(given).keys()):
        raise ValueError(f"--config {path} holds {unknown[0]!r}, which is no argument; train_hf.py --help lists them.")
    if given.keep is not None or given.epsilon is not None or given.no_gates:
        replaced = {"keep", "epsilon", "no_gates"} | ({"criterion"} if given.keep is None else set())
        stored = {name: value for name, value in stored.items() if name not in replaced}
    arguments = []
    for name, value in stored.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words = (json.dumps(one) if isinstance(one, dict) else str(one) for one in values if one is not True)
            arguments += [f"--{name}", *words]
    return arguments


def on_digits(args: argparse.Namespace) -> bool:
    return args.dataset_name is None and args.train_dir is None


def hub_id(name: str | None) -> str | None:
    """A name on the Hub; None for a directory, whose path means nothing elsewhere."""
    return None if name is None or Path(name).exists() else name


# Of these the course of a training does not depend, but for the last bits.
_UNRELATED = (
    "cuda_graphs", "num_threads", "dataloader_num_workers", "per_device_eval_batch_size", "with_remote_code",
    "with_onnx",
)  # fmt: skip


def binding_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Those that must be the same when a run is taken up again."""
    return {name: value for name, value in used_arguments(args).items() if name not in _UNRELATED}


def used_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the run depended on, without paths of this machine and what the scheduler at hand does not read."""
    unsaid = {"config", "output_dir", "compare_dense", "train_dir", "validation_dir", "license"}
    unsaid |= {"push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision"}
    unsaid |= {"checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"}
    unsaid |= {"with_tracking", "report_to", "logging_steps"}
    steps, decay = {"lr_milestones", "lr_restart_milestones", "lr_factors"}, {"lr_decay_start", "num_warmup_steps"}
    unsaid |= {"cosine": steps, "multistep": decay | {"lr_restart_milestones"}, "restarting": decay}[args.lr_scheduler]
    if args.augmentation == "resized_crop":
        unsaid |= {"padding"}
    else:
        unsaid |= {"color_jitter"}
        unsaid |= {"dataloader_num_workers"} if not args.streaming else set()
    if not args.streaming:
        unsaid |= {"shuffle_buffer_size"}
    plain = {"train_split_name": "train", "augmentation": "crop", "corrupt_images": "error", "eval_strategy": "epoch"}
    plain |= {"criterion": "response"}
    unsaid |= {name for name, value in plain.items() if vars(args)[name] == value}
    if args.no_gates:
        unsaid |= {"epsilon_warmup_epochs", "ramp_epochs", "patience", "no_live_removal"}
    unsaid |= {name for name in ("dataset_name", "model_name_or_path") if hub_id(getattr(args, name)) is None}
    return {
        name: value
        for name, value in vars(args).items()
        if value is not None and value is not False and name not in unsaid
    }
