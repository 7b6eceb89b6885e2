#!/usr/bin/env python
"""Train an image classifier that loses the residual blocks its task does not need.

    accelerate launch train_hf.py                      # eps_resnet110 on scikit-learn's digits; needs no network
    accelerate launch train_hf.py --compare_dense      # and the same recipe with the gates off, for comparison
    accelerate launch train_hf.py --dataset_name uoft-cs/cifar10 --flip --output_dir outputs/cifar10
    accelerate launch train_hf.py --config hub_configs/eps_resnet110.digits.json --keep 0.3
    accelerate launch train_hf.py --architecture eps_resnet18 --image_size 32 --keep 0.5    # any twin of a timm model
    accelerate launch train_hf.py --model_name_or_path me/first --dataset_name me/images --keep 0.5 --push_to_hub

A JSON file given with --config holds arguments by name; a flag on the command line wins over it. What is written to
--output_dir, and with --push_to_hub to the Hub: the model (timm and transformers load it), README.md (its card),
blocks.png, all_results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import create_repo
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, get_scheduler, pipeline

import timm_eps
from timm_eps import (
    EpsilonGate,
    EpsilonPruner,
    EpsResNetConfig,
    EpsResNetForImageClassification,
    data,
    onnx_export,
    report,
)
from timm_eps.eps_resnet import is_cifar_network

Images = data.ImageTensors | data.ImageFiles


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
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
    source("--image_column_name", help="found by type if not given")
    source("--label_column_name", help="found by type if not given")
    source("--max_train_samples", type=at_least(1), help="draw this many")
    source("--max_eval_samples", type=at_least(1), help="draw this many")
    source("--image_size", type=at_least(4), help="side in pixels; default that of the architecture, digits 8")
    source("--fold", type=int, default=0, help="which fifth of the digits to validate on, 0 to 4")
    source(
        "--augmentation",
        choices=["crop", "distort", "resized_crop"],
        default="crop",
        help="crop: after padding; distort: the paper's for SVHN; resized_crop: for large images, read when needed",
    )
    source("--padding", type=at_least(0), help="of crop and distort, pixels on each side; default size // 8")
    source("--color_jitter", type=float, nargs=3, help="of resized_crop: brightness, contrast and saturation")
    source("--flip", action="store_true", help="mirror half the images; not for digits")
    source("--crop_pct", type=share, help="share of the side that the centre crop for evaluation leaves")
    source("--dataloader_num_workers", type=at_least(0), default=0, help="processes that read large images")
    gate = parser.add_argument_group("gates").add_argument
    gate("--keep", type=fraction_or_number, help="share (0.25) or number (14) of branches to keep; default 0.25")
    gate("--epsilon", type=float, help="the paper's fixed threshold instead of --keep")
    gate("--no_gates", action="store_true", help="train the dense network only")
    gate("--epsilon_warmup_epochs", type=at_least(0), default=8, help="epochs with all gates open first")
    gate("--ramp_epochs", type=at_least(0), default=25, help="with --keep: epochs from there to the full budget")
    gate("--patience", type=at_least(1), default=3, help="epochs in a row a block is closed before it is removed")
    gate("--no_live_removal", action="store_true", help="remove closed blocks at the end, not during training")
    gate("--side_loss_weight", type=float, help="weight of the side head's loss; default 0.1 for CIFAR networks")
    train = parser.add_argument_group("training").add_argument
    train("--num_train_epochs", type=at_least(1), default=60)
    train("--per_device_train_batch_size", type=at_least(2), default=128)
    train("--per_device_eval_batch_size", type=at_least(1), default=512)
    train("--gradient_accumulation_steps", type=at_least(1), default=1)
    train("--optimizer", choices=["sgd", "adamw"], default="sgd", help="adamw: try a --learning_rate near 1e-3")
    train("--learning_rate", type=float, default=0.1)
    train("--momentum", type=float, default=0.9, help="of sgd")
    train("--nesterov", action="store_true", help="of sgd")
    train("--weight_decay", type=float, default=5e-3)
    train("--weight_decay_drop", type=float, nargs=2, metavar=("STEPS", "FACTOR"), help="multiply it every so often")
    train(
        "--lr_scheduler",
        choices=["cosine", "multistep", "restarting"],
        default="cosine",
        help="restarting is the paper's for small images, multistep that for ImageNet",
    )
    train("--num_warmup_steps", type=at_least(0), default=0, help="with cosine: steps of rising rate first")
    train("--lr_decay_start", type=share, default=0.3, help="with cosine: share of the training at full rate first")
    epochs = {"type": at_least(1), "nargs": "+"}
    train("--lr_milestones", **epochs, default=[82, 123, 300], help="not with cosine: epochs at which the rate falls")
    train("--lr_restart_milestones", **epochs, default=[41, 61, 150], help="the same, counted from a restart")
    train("--lr_factors", type=float, nargs="+", default=[1, 0.1, 0.01, 0.002], help="of the rate, between them")
    train("--num_threads", type=at_least(1), help="on the CPU; default: all cores this process may use")
    train("--seed", type=int, default=0)
    train("--compare_dense", action="store_true", help="train the same recipe with the gates off as well")
    parser.add_argument("--output_dir", help="default outputs/<architecture>-<data set>")
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
        "no_gates": ["keep", "epsilon", "compare_dense"],
        "dataset_name": ["train_dir"],
        "model_name_or_path": ["architecture", "crop_pct", "image_size", "model_args", "pretrained"],
    }.items():
        if getattr(args, flag) and (clash := next((name for name in excluded if getattr(args, name)), None)):
            parser.error(f"--{flag} and --{clash} exclude each other")
    for flag, needed in {
        "dataset_config_name": "dataset_name",
        "validation_dir": "train_dir",
        **dict.fromkeys(("hub_model_id", "hub_token", "hub_private_repo", "hub_revision"), "push_to_hub"),
    }.items():
        if getattr(args, flag) and not getattr(args, needed):
            parser.error(f"--{flag} goes with --{needed}")
    for flag, option, fitting in (
        ("color_jitter", "augmentation", ["resized_crop"]),
        ("flip", "augmentation", ["crop", "resized_crop"]),
        ("nesterov", "optimizer", ["sgd"]),
    ):
        if getattr(args, flag) and getattr(args, option) not in fitting:
            parser.error(f"--{flag} goes with --{option} {' or '.join(fitting)}")
    if args.keep is None and args.epsilon is None and not args.no_gates:
        args.keep = 0.25
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


def share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
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
        stored = {name: value for name, value in stored.items() if name not in ("keep", "epsilon", "no_gates")}
    arguments = []
    for name, value in stored.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words = (json.dumps(one) if isinstance(one, dict) else str(one) for one in values if one is not True)
            arguments += [f"--{name}", *words]
    return arguments


def load_images(args: argparse.Namespace) -> tuple[datasets.DatasetDict, dict[str, Any]]:
    """Both splits, and how the results and the card name them."""
    if on_digits(args):
        splits = data.load_digits(args.fold)
        about = {"dataset": "scikit-learn digits", "dataset_id": None, "eval_split": f"fold {args.fold} of 5"}
    else:
        splits, eval_split = data.load_splits(
            args.dataset_name, args.dataset_config_name, args.train_dir, args.validation_dir, args.train_val_split,
            args.label_column_name, args.seed, args.train_split_name,
        )  # fmt: skip
        name = hub_id(args.dataset_name)
        shown = name or Path(args.dataset_name or args.train_dir).name
        about = {"dataset": shown, "dataset_id": name, "eval_split": eval_split}
    splits["train"] = data.sample(splits["train"], args.max_train_samples, args.seed)
    splits["validation"] = data.sample(splits["validation"], args.max_eval_samples, args.seed)
    return splits, about


def on_digits(args: argparse.Namespace) -> bool:
    return args.dataset_name is None and args.train_dir is None


def hub_id(name: str | None) -> str | None:
    """A name on the Hub; None for a directory, whose path means nothing elsewhere."""
    return None if name is None or Path(name).exists() else name


def starting_config(args: argparse.Namespace) -> EpsResNetConfig:
    """The configuration of what the training begins with: the saved model, or the architecture."""
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(args.model_name_or_path)
        if not isinstance(config, EpsResNetConfig):
            raise ValueError(f"--model_name_or_path {args.model_name_or_path} is a {config.model_type}, no eps_resnet.")
    else:
        if not timm.is_model(args.architecture):
            raise ValueError(f"--architecture {args.architecture!r} is unknown; timm.list_models('eps_*') lists them.")
        config = EpsResNetConfig(architecture=args.architecture)
    if args.with_remote_code and not is_cifar_network(config.architecture):
        raise ValueError(f"--with_remote_code is for the paper's CIFAR networks, {config.architecture} is none.")
    return config


def input_of(args: argparse.Namespace, config: EpsResNetConfig, classes: int) -> dict[str, Any]:
    """timm's description of the input: that of the saved model, or of the architecture at the wanted size."""
    pretrained_cfg = dict(config.pretrained_cfg)
    if args.model_name_or_path:
        if config.num_labels != classes and not args.ignore_mismatched_sizes:
            raise ValueError(
                f"The saved model tells {config.num_labels} classes apart, the data set has {classes}; "
                "--ignore_mismatched_sizes gives it a new classifier."
            )
    elif size := args.image_size or (8 if on_digits(args) and is_cifar_network(config.architecture) else None):
        pretrained_cfg |= {"input_size": (3, size, size), "pool_size": None}
    if args.crop_pct:
        pretrained_cfg["crop_pct"] = args.crop_pct
    if pretrained_cfg["input_size"][0] != 3:
        raise ValueError(f"The model reads {pretrained_cfg['input_size'][0]} channels; this script feeds RGB images.")
    return pretrained_cfg


def load_splits(
    args: argparse.Namespace, raw: datasets.DatasetDict, columns: tuple[str, str], pretrained_cfg: dict[str, Any]
) -> dict[str, Images]:
    """Both splits as the network reads them: small images decoded into memory, large ones when they are needed."""
    if args.augmentation != "resized_crop":
        return {name: data.ImageTensors.decode(raw[name], pretrained_cfg, *columns) for name in raw}
    training = {"training": True, "flip": args.flip, "color_jitter": args.color_jitter}
    return {
        name: data.ImageFiles.of(raw[name], pretrained_cfg, *columns, **(training if name == "train" else {}))
        for name in raw
    }


def normalization(args: argparse.Namespace, train: Images) -> dict[str, Any]:
    """The paper's mean and deviation; they travel with the model. Weights keep those that they were trained with."""
    if args.model_name_or_path or args.pretrained:
        return {}
    if isinstance(train, data.ImageFiles):
        return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {"mean": data.channel_mean(train.images), "std": [128 / 255] * 3}


def build_model(args: argparse.Namespace, pretrained_cfg: dict[str, Any], label_names: list[str]) -> nn.Module:
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    if args.model_name_or_path:
        return AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            side_loss_weight=args.side_loss_weight,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            **labels,
        )
    model_args = args.model_args or {}
    if pretrained_cfg.get("fixed_input_size"):
        model_args = {"img_size": pretrained_cfg["input_size"][1:], **model_args}
    fields = {"pretrained_cfg": pretrained_cfg, "side_loss_weight": args.side_loss_weight, **labels}
    if args.pretrained:
        model = timm.create_model(args.architecture, pretrained=True, num_classes=len(label_names), **model_args)
        return EpsResNetForImageClassification.from_timm(model, **fields)
    return EpsResNetForImageClassification(
        EpsResNetConfig(architecture=args.architecture.partition(".")[0], model_args=model_args, **fields)
    )


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    splits: dict[str, Images],
    pretrained_cfg: dict[str, Any],
    with_gates: bool,
) -> tuple[nn.Module, EpsilonPruner | None, dict[str, Any]]:
    """One training run from the seed on. Returns the model, its pruner, and the results."""
    set_seed(args.seed)
    model = build_model(args, pretrained_cfg, splits["train"].label_names)
    groups = timm_eps.param_groups(model, args.weight_decay)
    if args.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    else:
        sgd = {"momentum": args.momentum, "nesterov": args.nesterov}
        optimizer = torch.optim.SGD(groups, lr=args.learning_rate, **sgd)
    batches = data.loader(
        splits["train"], args.per_device_train_batch_size, True, args.seed, args.dataloader_num_workers
    )
    steps = math.ceil(len(batches) / args.gradient_accumulation_steps) * args.num_train_epochs
    if args.lr_scheduler != "cosine":
        restarts = args.lr_restart_milestones if args.lr_scheduler == "restarting" else args.lr_milestones
        scheduler = timm_eps.RestartingLR(optimizer, args.lr_milestones, restarts, args.lr_factors)
    else:
        if args.num_warmup_steps > steps * args.lr_decay_start:
            raise ValueError(
                f"--num_warmup_steps {args.num_warmup_steps} is more than the {steps * args.lr_decay_start:.0f} of "
                f"{steps} steps after which the rate falls (--lr_decay_start {args.lr_decay_start})."
            )
        decay = {"num_decay_steps": round(steps * (1 - args.lr_decay_start)), "decay_type": "cosine"}
        scheduler = get_scheduler(
            "warmup_stable_decay", optimizer, args.num_warmup_steps, steps, scheduler_specific_kwargs=decay
        )
    pruner = None
    if with_gates:
        ramp = {} if args.keep is None else {"ramp_epochs": args.ramp_epochs}
        pruner = timm_eps.EpsilonPruner(
            model, optimizer, keep=args.keep, epsilon=args.epsilon, warmup_epochs=args.epsilon_warmup_epochs,
            patience=args.patience, live_removal=not args.no_live_removal, **ramp,
        )  # fmt: skip
    network, prepared_optimizer, batches = accelerator.prepare(model, optimizer, batches)
    padding = pretrained_cfg["input_size"][-1] // 8 if args.padding is None else args.padding
    augment = {
        "crop": data.PadCropFlip(padding, args.flip),
        "distort": data.Distort(padding),
        "resized_crop": nn.Identity(),  # done as the images are read
    }[args.augmentation]
    normalize = data.Normalize(pretrained_cfg).to(accelerator.device)

    accuracies, seconds, taken = [], 0.0, 0
    for epoch in range(args.num_train_epochs):
        start = time.perf_counter()
        network.train()
        losses = torch.zeros((), device=accelerator.device)
        name = f"{'' if pruner else 'dense, '}epoch {epoch + 1}/{args.num_train_epochs}"
        with tqdm(total=len(batches), desc=name, mininterval=0.5) as bar:
            for images, labels in batches:
                with accelerator.accumulate(network):
                    loss = network(normalize(augment(images)), labels=labels).loss
                    accelerator.backward(loss)
                    prepared_optimizer.step()
                    prepared_optimizer.zero_grad()
                if accelerator.sync_gradients:
                    taken += 1
                    if args.lr_scheduler == "cosine":
                        scheduler.step()
                    if args.weight_decay_drop and taken % args.weight_decay_drop[0] == 0:
                        for group in optimizer.param_groups:
                            group["weight_decay"] *= args.weight_decay_drop[1]
                losses += loss.detach()
                bar.update()
            if not torch.isfinite(losses):
                raise ValueError(
                    f"The loss of epoch {epoch + 1} is {losses.item()}; lower --learning_rate {args.learning_rate}."
                )
            if pruner:
                pruner.step()
            if args.lr_scheduler != "cosine":
                restarts = pruner and args.lr_scheduler == "restarting"
                scheduler.step(pruner.discarded if restarts else None)
            seconds += time.perf_counter() - start
            accuracies.append(evaluate(model, splits["validation"], normalize, args))
            left = f", blocks {pruner.total - pruner.discarded}/{pruner.total}" if pruner else ""
            bar.set_postfix_str(f"loss {losses.item() / len(batches):.4f}, accuracy {accuracies[-1]:.4f}{left}")
    # Without the autocast that mixed precision wraps around forward: what is measured now is what will be loaded.
    model = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    return (
        model,
        pruner,
        {
            "eval_accuracy": evaluate(model, splits["validation"], normalize, args),
            "eval_accuracy_by_epoch": accuracies,
            "train_seconds": seconds,
        },
    )


@torch.no_grad()
def evaluate(model: nn.Module, split: Images, normalize: data.Normalize, args: argparse.Namespace) -> float:
    """Share of a split that is classified correctly."""
    model.eval()
    correct = 0
    workers = args.dataloader_num_workers
    for images, labels in data.loader(split, args.per_device_eval_batch_size, shuffle=False, num_workers=workers):
        logits = model(normalize(images.to(model.device))).logits
        correct += int((logits.argmax(-1).cpu() == labels).sum())
    return correct / len(split)


def compare(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Structure, size and speed of the pruned network beside the unpruned one of its architecture."""
    arguments = dict(model.config.model_args)
    removed = arguments.pop("removed", [])
    dense = timm.create_model(model.config.architecture, num_classes=model.config.num_labels, **arguments)
    dense.to(images.device)
    total = sum(isinstance(module, EpsilonGate) for module in dense.modules())
    found = {"blocks_total": total, "blocks_kept": total - len(removed), "removed": removed}
    pair = {"dense_": dense, "": model.timm_model}
    for prefix, network in pair.items():
        found[f"{prefix}params"] = report.count_parameters(network)
        found[f"{prefix}macs"] = report.count_macs(network, images[:1])
    for batch_size in (1, 128):
        batch = images.repeat(math.ceil(batch_size / len(images)), 1, 1, 1)[:batch_size]
        for prefix, latency in report.paired_latency(pair, batch).items():
            found[f"{prefix}latency_batch{batch_size}_seconds"] = latency
    return found


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) of a batch, and of its images one by one: other kernels run, which round differently."""
    model.eval()
    answers = [model(images), *(model(image) for image in images.split(1))]
    batch, *singles = (getattr(answer, "logits", answer).cpu() for answer in answers)
    return batch, torch.cat(singles)


def check_reload(directory: str, live: tuple[Tensor, Tensor], images: Tensor, pictures: list) -> str:
    """Load the directory by every loader and compare logits with the live model's. Raises if one differs."""
    by_timm = timm.create_model(f"local-dir:{directory}", pretrained=True).to(images.device)
    by_auto = AutoModelForImageClassification.from_pretrained(directory).to(images.device)
    classify = pipeline("image-classification", model=directory, device=images.device)
    number_of = by_auto.config.label2id
    scores = torch.empty_like(live[1])
    for row, answers in enumerate(classify(pictures, top_k=len(number_of), function_to_apply="none")):
        for answer in answers:
            scores[row, number_of[answer["label"]]] = answer["score"]
    largest = {
        "timm": difference(logits_of(by_timm, images), live),
        "AutoModelForImageClassification": difference(logits_of(by_auto, images), live),
        "pipeline": difference([scores], live[1:]),
    }
    if wrong := {name: value for name, value in largest.items() if not value <= 1e-5}:
        raise RuntimeError(f"The model saved in {directory} computes other logits than the live one: {wrong}.")
    return ", ".join(f"{name} {'equal' if value == 0 else f'within {value:.1e}'}" for name, value in largest.items())


def difference(some: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(argv)
    transformers.logging.disable_progress_bar()
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    if accelerator.num_processes > 1:
        raise ValueError(f"Got {accelerator.num_processes} processes; blocks are removed in one process only so far.")
    if accelerator.device.type == "cpu":
        # accelerate launch leaves a process one thread where it finds no accelerator.
        torch.set_num_threads(args.num_threads or available_cores())
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    # Better to fail here than after the training.
    tempfile.TemporaryFile(dir=args.output_dir).close()
    if args.with_onnx:
        onnx_export.check_installed()
    repo_id = None
    if args.push_to_hub:
        wanted = args.hub_model_id or Path(args.output_dir).resolve().name
        repo_id = create_repo(
            wanted, private=args.hub_private_repo or None, token=args.hub_token, exist_ok=True
        ).repo_id

    config = starting_config(args)
    raw, about = load_images(args)
    columns = data.find_columns(raw["train"].features, args.image_column_name, args.label_column_name)
    pretrained_cfg = input_of(args, config, raw["train"].features[columns[1]].num_classes)
    splits = load_splits(args, raw, columns, pretrained_cfg)
    data.check_classes(**splits)
    pretrained_cfg |= normalization(args, splits["train"])

    size = "x".join(str(n) for n in pretrained_cfg["input_size"])
    accelerator.print(
        f"Training {args.model_name_or_path or args.architecture} on {len(splits['train']):,} images of "
        f"{about['dataset']} ({size}, {len(splits['train'].label_names)} classes), "
        f"testing on {len(splits['validation']):,} ({about['eval_split']}); seed {args.seed}."
    )
    model, pruner, results = train(args, accelerator, splits, pretrained_cfg, with_gates=not args.no_gates)
    if args.compare_dense and pruner:
        _, _, dense = train(args, accelerator, splits, pretrained_cfg, with_gates=False)
        results |= {f"dense_{name}": value for name, value in dense.items()}

    sample = data.Normalize(pretrained_cfg)(splits["validation"].first(32)).to(accelerator.device)
    live = logits_of(model, sample)
    history = pruner.history if pruner else []
    timm_eps.remove_closed(model)
    results |= about
    results |= compare(model, sample)
    results |= {
        "architecture": model.config.architecture,
        "arguments": used_arguments(args),
        "base_model": base_model(args),
        "epsilon": max((record["epsilon"] for record in history), default=0.0),
        "train_images": len(splits["train"]),
        "eval_images": len(splits["validation"]),
        "license": args.license,
        "seed": args.seed,
        "hardware": f"{torch.get_num_threads()} threads of {platform.machine()}"
        if accelerator.device.type == "cpu"
        else torch.cuda.get_device_name(accelerator.device),
        "versions": versions(),
    }
    saved = {
        "results": results, "history": history, "remote_code": args.with_remote_code, "onnx": args.with_onnx,
    }  # fmt: skip
    timm_eps.save_pretrained(model, args.output_dir, repo_id=repo_id, **saved)

    gone = 100 * (1 - results["params"] / results["dense_params"])
    accelerator.print(
        f"\n{results['blocks_kept']} of {results['blocks_total']} residual branches stayed; "
        f"{gone:.1f} % of the parameters are gone. The network that is left classifies "
        f"{100 * results['eval_accuracy']:.2f} % of the {results['eval_images']} test images correctly."
        f"\n\n{report.comparison_table(results)}\n"
    )
    pictures = [row.convert("RGB") for row in raw["validation"][:32][columns[0]]]
    accelerator.print(f"Saved in {args.output_dir}. Logits of {len(sample)} test images after reloading it through:")
    accelerator.print(check_reload(args.output_dir, live, sample, pictures) + ".")
    if repo_id is not None:
        try:
            commit = timm_eps.push_to_hub(
                model, repo_id, token=args.hub_token, revision=args.hub_revision,
                commit_message=f"Trained on {about['dataset']}, {results['blocks_kept']} blocks left", **saved,
            )  # fmt: skip
        except (OSError, RuntimeError) as error:  # huggingface_hub raises the latter when an upload fails
            raise OSError(
                f"What is saved in {args.output_dir} could not be pushed to {repo_id}: {error}. Nothing of it is "
                f"there; to try again: hf upload {repo_id} {args.output_dir}"
            ) from error
        accelerator.print(f"Pushed to {commit.repo_url} ({commit.oid[:7]}).")
    return results


def base_model(args: argparse.Namespace) -> str | None:
    """Where the weights came from that the training began with, by a name on the Hub."""
    if args.pretrained:
        return timm.get_pretrained_cfg(args.architecture).hf_hub_id
    return hub_id(args.model_name_or_path)


def available_cores() -> int:
    """Cores this process may run on; all of the machine's where the system cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def used_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the run depended on, without paths of this machine and what the scheduler at hand does not read."""
    unsaid = {"config", "output_dir", "compare_dense", "train_dir", "validation_dir", "license"}
    unsaid |= {"push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision"}
    steps, decay = {"lr_milestones", "lr_restart_milestones", "lr_factors"}, {"lr_decay_start", "num_warmup_steps"}
    unsaid |= {"cosine": steps, "multistep": decay | {"lr_restart_milestones"}, "restarting": decay}[args.lr_scheduler]
    if args.augmentation == "resized_crop":
        unsaid |= {"padding"}
    else:
        unsaid |= {"color_jitter", "dataloader_num_workers"}
    unsaid |= {
        name for name, plain in (("train_split_name", "train"), ("augmentation", "crop")) if vars(args)[name] == plain
    }
    if args.no_gates:
        unsaid |= {"epsilon_warmup_epochs", "ramp_epochs", "patience", "no_live_removal"}
    unsaid |= {name for name in ("dataset_name", "model_name_or_path") if hub_id(getattr(args, name)) is None}
    return {
        name: value
        for name, value in vars(args).items()
        if value is not None and value is not False and name not in unsaid
    }


def versions() -> dict[str, str]:
    return {module.__name__: str(module.__version__) for module in (timm_eps, timm, torch, transformers)}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train_hf.py: error: {' '.join(str(error).split())}") from error
