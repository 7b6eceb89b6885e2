"""The network, the optimizer, its schedule and the pruner of a run, by the arguments of ``train_hf.py``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForImageClassification, get_scheduler

from ..hf.configuration_eps_resnet import EpsResNetConfig
from ..hf.modeling_eps_resnet import EpsResNetForImageClassification
from ..pruner import EpsilonPruner
from ..schedule import RestartingLR
from ..surgery.removal import param_groups
from . import data, start

__all__ = ["build_model", "build_optimizer", "build_pruner", "build_scheduler"]

# Of the steps, where a network begins with weights and --num_warmup_steps is not given.
WARMUP_SHARE = 0.05


def build_model(args: argparse.Namespace, pretrained_cfg: dict[str, Any], train: data.Images) -> nn.Module:
    """The network that the arguments name, with a classifier for the classes of the training images."""
    label_names = train.label_names
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    if args.model_name_or_path:
        return AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            side_loss_weight=args.side_loss_weight,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            pretrained_cfg=pretrained_cfg,
            **labels,
        )
    model_args = args.model_args or {}
    if pretrained_cfg.get("fixed_input_size"):
        model_args = {"img_size": pretrained_cfg["input_size"][1:], **model_args}
    fields = {"pretrained_cfg": pretrained_cfg, "side_loss_weight": args.side_loss_weight, **labels}
    if args.pretrained:
        model = timm.create_model(args.architecture, pretrained=True, num_classes=len(label_names), **model_args)
        return EpsResNetForImageClassification.from_timm(model, **fields)
    if args.per_pixel_mean:
        model_args = {"pixel_mean": list(pretrained_cfg["input_size"][1:]), **model_args}
    model = EpsResNetForImageClassification(
        EpsResNetConfig(architecture=args.architecture.partition(".")[0], model_args=model_args, **fields)
    )
    if args.per_pixel_mean:
        mean, std = (torch.tensor(pretrained_cfg[name], dtype=torch.float64).view(-1, 1, 1) for name in ("mean", "std"))
        assert isinstance(train, data.ImageTensors), "checked with the arguments"
        model.timm_model.stem.pixel_mean.mean.copy_((data.pixel_mean(train.images) / 255 - mean) / std)
    return model


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW, whose weight decay reaches all that bounds a branch's output."""
    groups = param_groups(model, args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.learning_rate)
    return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum, nesterov=args.nesterov)


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Cosine takes a step with the optimizer, the others one an epoch."""
    if args.lr_scheduler != "cosine":
        restarts = args.lr_restart_milestones if args.lr_scheduler == "restarting" else args.lr_milestones
        return RestartingLR(optimizer, args.lr_milestones, restarts, args.lr_factors)
    warmup = round(WARMUP_SHARE * steps) if args.num_warmup_steps is None else args.num_warmup_steps
    if warmup and warmup >= steps:
        raise ValueError(f"--num_warmup_steps {warmup} must be below the {steps} steps of the run.")
    # With --lr_decay_start 0 the rate falls as soon as the warm-up ends.
    falling = min(round(steps * (1 - args.lr_decay_start)), steps - warmup)
    decay = {"num_decay_steps": falling, "decay_type": "cosine"}
    return get_scheduler("warmup_stable_decay", optimizer, warmup, steps, scheduler_specific_kwargs=decay)


def build_pruner(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    analysed: start.Batches,
    followers: Iterable[Any],
) -> EpsilonPruner:
    """The pruner of a training in which branches close.

    Args:
        args: Of the command line.
        model: The network that is trained.
        optimizer: Holds its parameters.
        analysed: Images for a criterion that compares branches.
        followers: Averages of the weights.
    """
    budget = start.budget_of(args)
    ramp: dict[str, Any] = {}
    if budget is not None:
        ramp = {"ramp_epochs": args.ramp_epochs, "criterion": start.ramp_criterion(args, analysed)}
        ramp[budget.argument] = args.keep if budget.argument == "keep" else budget
    return EpsilonPruner(
        model, optimizer, epsilon=args.epsilon, warmup_epochs=args.epsilon_warmup_epochs, patience=args.patience,
        live_removal=not args.no_live_removal, followers=followers, **ramp,
    )  # fmt: skip
