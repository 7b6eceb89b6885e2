"""The arguments of ``train_hf.py``: on the command line, in a configuration file, and in the record of a run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from ..budget import BUDGETS

__all__ = [
    "begins_with_weights", "binding_arguments", "hub_id", "on_digits", "parse_arguments", "used_arguments",
]  # fmt: skip


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The arguments of a run, checked as far as they can be without data and model. Exits with a message if wrong."""
    parser = build_parser(description)
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    args = parser.parse_args([*read_config(given), *argv]) if given.config else given
    try:
        fill_in(args)
        check_together(args)
    except ValueError as error:
        parser.error(str(error))
    return args


class _ShowDefaults(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Names each default that is a value; an option that is off, or whose default depends on others, says so itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False) or action.help is None or "default" in action.help:
            return action.help or ""
        return super()._get_help_string(action) or ""


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line. Arguments whose default depends on others are None until :func:`fill_in`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_ShowDefaults, allow_abbrev=False)
    parser.add_argument("--config", help="JSON file with arguments by name; flags on the command line win over it")
    parser.add_argument("--output_dir", help="default outputs/<architecture>-<data set>")
    parser.add_argument(
        "--dry_run", action="store_true", help="show what can be removed and what it costs; no training"
    )
    _add_model(parser.add_argument_group("model").add_argument)
    _add_data(parser.add_argument_group("data (without any of these: scikit-learn's digits)").add_argument)
    _add_pruning(parser.add_argument_group("how much may stay, which branches go, and when").add_argument)
    _add_distillation(parser.add_argument_group("distillation").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)
    _add_checkpoints(parser.add_argument_group("checkpoints and tracking").add_argument)
    _add_saving(parser.add_argument_group("saving and the Hub").add_argument)
    _add_paper(parser.add_argument_group("the paper's own settings").add_argument)
    return parser


Add: TypeAlias = Callable[..., argparse.Action]


def _add_model(add: Add) -> None:
    add("--model_name_or_path", help="a saved model, on the Hub or a directory, to go on from")
    add("--architecture", help="a model that this package registers with timm; default eps_resnet110")
    add("--pretrained", action="store_true", help="begin with timm's weights; eps_resnet50.a1_in1k names a tag")
    add("--model_args", type=json_object, help='JSON with keyword arguments for timm, such as {"drop_rate": 0.1}')
    add("--ignore_mismatched_sizes", action="store_true", help="new classifier where the saved one does not fit")


def _add_data(add: Add) -> None:
    add("--dataset_name", help="a data set on the Hub, or a directory that datasets.load_dataset reads")
    add("--dataset_config_name", help="configuration of the data set")
    add("--train_dir", help="a directory with one sub-directory of images a class")
    add("--validation_dir", help="the same, to validate on")
    add("--test_dir", help="the same, to test the final network on, once")
    add("--train_split_name", default="train", help="or several, such as train+extra")
    add("--test_split_name", help="a split of the data set to test the final network on, once")
    add("--train_val_split", type=share, default=0.15, help="share to validate on if there is no such split")
    add("--image_column_name", help="found by type if not given; images, encoded files or paths")
    add("--label_column_name", help="found by type if not given; classes, strings or whole numbers")
    add("--max_train_samples", type=at_least(1), help="draw this many; of a stream, make so many an epoch")
    add("--max_eval_samples", type=at_least(1), help="draw this many; of a stream, the first ones")
    add("--streaming", action="store_true", help="read images as they come, for data that do not fit the disk")
    add("--shuffle_buffer_size", type=at_least(1), default=1000, help="of a stream: draw the next of so many images")
    add("--corrupt_images", choices=["error", "skip"], default="error", help="skip: leave them out and count them")
    add("--image_size", type=at_least(4), help="side in pixels; default that of the architecture, digits 8")
    add("--fold", type=int, default=0, help="which fifth of the digits to validate on, 0 to 4")
    add(
        "--augmentation",
        choices=["crop", "distort", "resized_crop"],
        default="crop",
        help="crop: after padding; resized_crop: for large images, read when needed; distort: the paper's for SVHN",
    )
    add("--padding", type=at_least(0), help="of crop and distort, pixels on each side; default size // 8")
    add("--color_jitter", type=finite, nargs=3, help="of resized_crop: brightness, contrast and saturation")
    add("--flip", action="store_true", help="mirror half the images; not for digits")
    add("--crop_pct", type=share, help="share of the side that the centre crop for evaluation leaves")
    add("--dataloader_num_workers", type=at_least(0), default=0, help="processes that read large images")


def _add_pruning(add: Add) -> None:
    amount = "of the dense network: a share (0.5), or a number of"
    add("--keep", type=fraction_or_number, help="share (0.25) or number (14) of branches to keep; default 0.25")
    add("--target_params", type=fraction_or_number, help=f"{amount} parameters")
    add("--target_macs", type=fraction_or_number, help=f"{amount} multiply-adds for an image")
    add("--target_latency", type=fraction_or_number, help=f"{amount} milliseconds of a forward pass on this device")
    add("--latency_batch_size", type=at_least(1), default=32, help="images of that pass")
    add("--no_gates", action="store_true", help="train the dense network only")
    add(
        "--prune_at",
        choices=["start", "ramp"],
        help="start: remove branches, then train; ramp: while it trains. Default: start for a network that begins with "
        "weights, ramp for one from scratch",
    )
    add(
        "--criterion",
        choices=["response", "importance", "leave_one_out", "last"],
        help="which branches go first: by response; by an estimate of what the loss would change without them; by what "
        "it does change; or the last of the network. Default: last at the start, response on the ramp",
    )
    add("--epsilon_warmup_epochs", type=at_least(0), help="ramp: epochs with all gates open first; default 4, or fewer")
    add("--ramp_epochs", type=at_least(0), help="epochs from there to the full budget; default 8, or fewer")
    add("--patience", type=at_least(1), default=3, help="ramp: epochs a branch stays closed before it is removed")
    add("--no_live_removal", action="store_true", help="ramp: remove closed branches at the end, not during training")


def _add_distillation(add: Add) -> None:
    add("--teacher", help="self, or a saved model, on the Hub or a directory, with the same classes")
    add("--teacher_weight", type=share, default=0.5, help="its share of the loss; the labels have the rest")
    add("--teacher_temperature", type=finite, default=2.0, help="divisor of the logits of both")
    add(
        "--dense_epochs",
        type=at_least(0),
        help="with --teacher self or --criterion leave_one_out: epochs in which the dense network is fine-tuned first; "
        "default: as many as --num_train_epochs if its classifier is new, else 0",
    )


def _add_training(add: Add) -> None:
    add("--num_train_epochs", type=at_least(0), help="default 60; 20 for a network that begins with weights")
    add(
        "--steps_per_epoch",
        type=at_least(1),
        help="an epoch is so many steps of the optimizer, not a pass through the images; all that goes by epochs does",
    )
    add("--eval_strategy", choices=["epoch", "no"], default="epoch", help="no: test the final network only")
    add("--early_stopping_patience", type=at_least(1), help="stop after so many epochs without a better accuracy")
    add("--per_device_train_batch_size", type=at_least(2), help="default 128; 32 where weights are fine-tuned")
    add("--per_device_eval_batch_size", type=at_least(1), default=512, help="images at once in evaluation")
    add("--gradient_accumulation_steps", type=at_least(1), default=1, help="batches of a step")
    add("--optimizer", choices=["sgd", "adamw"], default="sgd", help="of torch")
    add(
        "--learning_rate",
        type=float,
        help="default 0.1 for sgd and 0.001 for adamw; a tenth of it for a network that begins with weights",
    )
    add("--momentum", type=finite, default=0.9, help="of sgd")
    add("--nesterov", action="store_true", help="of sgd")
    add("--weight_decay", type=finite, help="default 5e-3; 1e-4 for a network that begins with weights")
    add(
        "--lr_scheduler",
        choices=["cosine", "multistep", "restarting"],
        default="cosine",
        help="multistep and restarting are the paper's, for ImageNet and for small images",
    )
    add(
        "--num_warmup_steps",
        type=at_least(0),
        help="with cosine: steps of rising rate first; default 0; 5 %% of all for a network that begins with weights",
    )
    add(
        "--lr_decay_start",
        type=share,
        help="with cosine: share of the training at full rate first; default 0.3; 0 for a network that begins with "
        "weights",
    )
    add("--label_smoothing_factor", type=share, default=0.0, help="probability that is spread over all classes")
    add("--mixup_alpha", type=not_negative, default=0.0, help="mix images; 0 is off, 0.2 is usual")
    add("--cutmix_alpha", type=not_negative, default=0.0, help="paste a part of one image into another; 0 is off")
    add("--model_ema", action="store_true", help="test and save a moving average of the weights")
    add("--model_ema_decay", type=share, default=0.9998, help="of the average, reached after a warm-up")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as accelerate was configured")
    add("--num_threads", type=at_least(1), help="on the CPU, of each process; default: all cores, divided")
    add("--compile", action="store_true", help="by torch.compile; compiles anew after each removal")
    add("--cuda_graphs", action="store_true", help="start a step's kernels all at once: deep networks train faster")
    add("--channels_last", action="store_true", help="the memory format that accelerators prefer")
    add("--sync_batchnorm", action="store_true", help="batch norm over the batches of all processes")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--compare_dense", action="store_true", help="train the same recipe with the gates off as well")


def _add_checkpoints(add: Add) -> None:
    add("--checkpointing_steps", type=steps_or_epoch, help="a number of steps, or 'epoch'; default: none")
    add("--checkpoints_total_limit", type=at_least(1), help="keep only the last ones")
    add(
        "--resume_from_checkpoint",
        nargs="?",
        const="latest",
        help="a checkpoint's directory, or 'latest' in --output_dir; begins anew if there is none",
    )
    add("--with_tracking", action="store_true", help="log to the trackers of --report_to")
    add("--report_to", nargs="+", help="tensorboard, wandb, comet_ml, ...; default all that are installed")
    add("--logging_steps", type=at_least(1), help="also log the loss every so many steps, not only each epoch")


def _add_saving(add: Add) -> None:
    add("--with_remote_code", action="store_true", help="add code to load a CIFAR network without this package")
    add("--with_onnx", action="store_true", help="add onnx/model.onnx")
    add("--license", default="apache-2.0", help="of the weights, for the card")
    add("--push_to_hub", action="store_true", help="push what is in --output_dir, in one commit")
    add("--hub_model_id", help="owner/name; default the name of --output_dir, under your own")
    add("--hub_token", help="default: the one that `hf auth login` stored")
    add("--hub_private_repo", action="store_true", help="if the repository is made now")
    add("--hub_revision", help="the branch to push to; default main")


def _add_paper(add: Add) -> None:
    add("--epsilon", type=finite, help="a fixed threshold for all branches, instead of a budget")
    add("--side_loss_weight", type=finite, help="weight of the side head's loss; default 0.1 for CIFAR networks")
    add(
        "--per_pixel_mean",
        action="store_true",
        help="for CIFAR: the network takes off the mean of each pixel, not only of each channel",
    )
    epochs: dict[str, Any] = {"type": at_least(1), "nargs": "+"}
    add("--lr_milestones", **epochs, default=[82, 123, 300], help="not with cosine: epochs at which the rate falls")
    add("--lr_restart_milestones", **epochs, default=[41, 61, 150], help="the same, counted from a restart")
    add("--lr_factors", type=finite, nargs="+", default=[1, 0.1, 0.01, 0.002], help="of the rate, between them")
    add("--weight_decay_drop", type=finite, nargs=2, metavar=("STEPS", "FACTOR"), help="multiply it every so often")


def has_budget(args: argparse.Namespace) -> bool:
    """Whether it is said how much may stay."""
    return any(getattr(args, name) is not None for name in BUDGETS)


def begins_with_weights(args: argparse.Namespace) -> bool:
    """Whether the network has learnt something already."""
    return bool(args.model_name_or_path or args.pretrained)


def fill_in(args: argparse.Namespace) -> None:
    """Choose what is not given: a network that begins with weights is fine-tuned, any other trained from scratch.

    Raises:
        ValueError: What is given excludes each other.
    """
    _check_pairs(args)
    if not (has_budget(args) or args.epsilon is not None or args.no_gates):
        args.keep = 0.25
    has_weights = begins_with_weights(args)
    if args.prune_at is None:
        args.prune_at = "start" if has_weights and not args.no_gates and args.epsilon is None else "ramp"
    if args.criterion is None:
        args.criterion = "last" if args.prune_at == "start" else "response"
    tenth = 0.1 if has_weights else 1.0
    for name, value in {
        "num_train_epochs": 20 if has_weights else 60,
        "per_device_train_batch_size": 32 if has_weights else 128,
        "learning_rate": {"sgd": 0.1, "adamw": 0.001}[args.optimizer] * tenth,
        "weight_decay": 1e-4 if has_weights else 5e-3,
        "lr_decay_start": 0.0 if has_weights else 0.3,
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.num_warmup_steps is None and not has_weights:
        args.num_warmup_steps = 0  # else a share of the steps, whose number the data decide
    fit_to_epochs(args)
    if args.model_name_or_path is None and args.architecture is None:
        args.architecture = "eps_resnet110"
    if args.output_dir is None:
        names = args.model_name_or_path or args.architecture, args.dataset_name or args.train_dir or "digits"
        args.output_dir = str(Path("outputs") / "-".join(Path(name).name for name in names))


def _check_pairs(args: argparse.Namespace) -> None:
    others = {name: [other for other in BUDGETS if other != name] for name in BUDGETS}
    for flag, excluded in {
        **others,
        "epsilon": [*BUDGETS],
        "cuda_graphs": ["compile"],
        "no_gates": [*BUDGETS, "epsilon", "compare_dense"],
        "dataset_name": ["train_dir"],
        "per_pixel_mean": ["pretrained", "streaming"],
        "steps_per_epoch": ["streaming"],
        "model_name_or_path": ["architecture", "crop_pct", "model_args", "per_pixel_mean", "pretrained"],
    }.items():
        if getattr(args, flag) and (clash := next((name for name in excluded if getattr(args, name)), None)):
            raise ValueError(f"--{flag} and --{clash} exclude each other")
    for flag, needed in {
        "dataset_config_name": "dataset_name",
        "test_split_name": "dataset_name",
        **dict.fromkeys(("validation_dir", "test_dir"), "train_dir"),
        "checkpoints_total_limit": "checkpointing_steps",
        **dict.fromkeys(("report_to", "logging_steps"), "with_tracking"),
        **dict.fromkeys(("hub_model_id", "hub_token", "hub_private_repo", "hub_revision"), "push_to_hub"),
    }.items():
        if getattr(args, flag) and not getattr(args, needed):
            raise ValueError(f"--{flag} goes with --{needed}")


def check_together(args: argparse.Namespace) -> None:
    """Check arguments that must fit each other, when all of them are known.

    Raises:
        ValueError: Two of them do not.
    """
    if args.cuda_graphs and args.gradient_accumulation_steps > 1:
        raise ValueError("--cuda_graphs goes with --gradient_accumulation_steps 1")
    if args.weight_decay_drop and args.weight_decay_drop[0] < 1:
        raise ValueError(f"--weight_decay_drop: STEPS must be at least 1, got {args.weight_decay_drop[0]:g}")
    for flag, option, fitting in (
        ("color_jitter", "augmentation", ["resized_crop"]),
        ("flip", "augmentation", ["crop", "resized_crop"]),
        ("per_pixel_mean", "augmentation", ["crop", "distort"]),
        ("nesterov", "optimizer", ["sgd"]),
        ("early_stopping_patience", "eval_strategy", ["epoch"]),
    ):
        if getattr(args, flag) and getattr(args, option) not in fitting:
            raise ValueError(f"--{flag} goes with --{option} {' or '.join(fitting)}")
    if args.prune_at == "start" and not has_budget(args):
        raise ValueError("--prune_at start goes with --keep or a target")
    if args.criterion != "response" and not has_budget(args):
        raise ValueError(f"--criterion {args.criterion} goes with --keep or a target")
    if args.prune_at == "start" and args.criterion == "importance":
        raise ValueError("--criterion importance goes with --prune_at ramp: it is measured while a network trains")
    if args.num_train_epochs == 0 and not begins_with_weights(args):
        raise ValueError("--num_train_epochs 0 goes with --model_name_or_path: it prunes a network that is trained")
    if args.num_train_epochs == 0 and args.prune_at == "ramp" and not args.no_gates:
        raise ValueError("--num_train_epochs 0 goes with --prune_at start")
    if args.dense_epochs and args.teacher != "self" and args.criterion != "leave_one_out":
        raise ValueError("--dense_epochs goes with --teacher self or --criterion leave_one_out")
    if args.teacher and args.teacher_weight <= 0:
        raise ValueError(f"--teacher_weight must be above 0, got {args.teacher_weight:g}")
    if args.teacher and args.teacher_temperature <= 0:
        raise ValueError(f"--teacher_temperature must be above 0, got {args.teacher_temperature:g}")


def fit_to_epochs(args: argparse.Namespace) -> None:
    """Choose the warm-up and the ramp where they are not given: shorter ones if the run has few epochs.

    A network that begins with weights is open for 6 % of the epochs, and closes branches for 24 %.
    """
    epochs = args.num_train_epochs
    warmup, ramp = 4, 8
    if not args.no_gates and begins_with_weights(args):
        warmup, ramp = max(1, round(0.06 * epochs)), max(1, round(0.24 * epochs))
    elif not args.no_gates and 4 + 8 + args.patience > epochs:
        warmup = max(1, epochs // 5)
        ramp = max(1, epochs // 2 - (warmup if args.epsilon_warmup_epochs is None else args.epsilon_warmup_epochs))
    if args.epsilon_warmup_epochs is None:
        args.epsilon_warmup_epochs = warmup
    if args.ramp_epochs is None:
        args.ramp_epochs = ramp


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


def not_negative(text: str) -> float:
    if (value := finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
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
    if has_budget(given) or given.epsilon is not None or given.no_gates:
        replaced = {*BUDGETS, "epsilon", "no_gates"} | (set() if has_budget(given) else {"criterion", "prune_at"})
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
    unsaid = {"config", "output_dir", "compare_dense", "dry_run", "license"}
    unsaid |= {"train_dir", "validation_dir", "test_dir"}
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
    plain: dict[str, Any] = {
        "train_split_name": "train",
        "augmentation": "crop",
        "corrupt_images": "error",
        "eval_strategy": "epoch",
    }
    plain |= {"criterion": "response", "prune_at": "ramp"}
    plain |= dict.fromkeys(("label_smoothing_factor", "mixup_alpha", "cutmix_alpha"), 0.0)
    unsaid |= {name for name, value in plain.items() if vars(args)[name] == value}
    if args.no_gates or args.prune_at == "start":
        unsaid |= {"epsilon_warmup_epochs", "ramp_epochs", "patience", "no_live_removal"}
    if args.target_latency is None:
        unsaid |= {"latency_batch_size"}
    if args.teacher is None:
        unsaid |= {"teacher_weight", "teacher_temperature"}
    if not args.model_ema:
        unsaid |= {"model_ema_decay"}
    unsaid |= {
        name for name in ("dataset_name", "model_name_or_path", "teacher") if hub_id(getattr(args, name)) is None
    }
    return {
        name: value
        for name, value in vars(args).items()
        if value is not None and value is not False and name not in unsaid
    }
