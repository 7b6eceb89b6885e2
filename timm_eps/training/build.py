"""Build the network, the optimizer, its schedule and the pruner of a run from the arguments of ``train_hf.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import get_scheduler

from ..hf.configuration_eps_resnet import EpsResNetConfig
from ..hf.modeling_eps_resnet import EpsResNetForImageClassification
from ..learning_rate import RestartingLR
from ..pruner import EpsilonPruner
from ..surgery.parameters import param_groups
from . import choices, data
from .arguments import Arguments, DataArguments, ModelArguments, PaperArguments, TrainingArguments
from .inputs import ImageData
from .sync_batchnorm import synchronize_batchnorm

__all__ = [
    "augmentation",
    "average",
    "batches",
    "evaluation_batches",
    "model",
    "optimizer",
    "place",
    "pruner",
    "scheduler",
]

# Share of the steps, for a pretrained network without --num_warmup_steps.
WARMUP_SHARE = 0.05


def model(args: ModelArguments, paper: PaperArguments, images: ImageData) -> nn.Module:
    """The network of the arguments, with a classifier for the classes of the training images."""
    label_names, pretrained_cfg, train = images.label_names, images.pretrained_cfg, images.splits["train"]
    numbers = {name: number for number, name in enumerate(label_names)}
    labels: dict[str, Any] = {"id2label": dict(enumerate(label_names)), "label2id": numbers}
    if args.model_name_or_path:
        return EpsResNetForImageClassification.from_pretrained(
            args.model_name_or_path,
            side_loss_weight=paper.side_loss_weight,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            pretrained_cfg=pretrained_cfg,
            **labels,
        )
    model_args = args.model_args or {}
    if pretrained_cfg.get("fixed_input_size"):
        model_args = {"img_size": pretrained_cfg["input_size"][1:], **model_args}
    fields: dict[str, Any] = {"pretrained_cfg": pretrained_cfg, "side_loss_weight": paper.side_loss_weight, **labels}
    if args.pretrained:
        model = timm.create_model(args.name, pretrained=True, num_classes=len(label_names), **model_args)
        return EpsResNetForImageClassification.from_timm(model, **fields)
    if paper.per_pixel_mean:
        model_args = {"pixel_mean": list(pretrained_cfg["input_size"][1:]), **model_args}
    architecture = args.name.partition(".")[0]
    config = EpsResNetConfig(architecture=architecture, model_args=model_args, **fields)
    model = EpsResNetForImageClassification(config)
    if paper.per_pixel_mean:
        mean, std = (torch.tensor(pretrained_cfg[name], dtype=torch.float64).view(-1, 1, 1) for name in ("mean", "std"))
        assert isinstance(train, data.ImageTensors), "checked with the arguments"
        model.timm_model.stem.pixel_mean.mean.copy_((data.pixel_mean(train.images) / 255 - mean) / std)
    return model


def batches(args: Arguments, accelerator: Accelerator, images: ImageData) -> data.TrainingBatches:
    """The training batches of this process."""
    training = args.training
    return data.TrainingBatches(
        images.splits["train"], training.per_device_train_batch_size, training.seed, rank=accelerator.process_index,
        processes=accelerator.num_processes, num_workers=args.data.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda", buffer_size=args.data.shuffle_buffer_size,
        per_epoch=training.steps_per_epoch and training.steps_per_epoch * training.gradient_accumulation_steps,
    )  # fmt: skip


def evaluation_batches(args: Arguments, accelerator: Accelerator, images: ImageData, split: str) -> DataLoader:
    """The evaluation batches of a split, for this process."""
    return data.evaluation_batches(
        images.splits[split], args.training.per_device_eval_batch_size, rank=accelerator.process_index,
        processes=accelerator.num_processes, num_workers=args.data.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip


def augmentation(args: DataArguments, size: int) -> Callable[[Tensor, data.Draws], Tensor]:
    """Augmentation of a batch of images with this side in pixels, before normalisation."""
    padding = size // 8 if args.padding is None else args.padding
    if args.augmentation == "crop":
        return data.PadCropFlip(padding, args.flip)
    if args.augmentation == "distort":
        return data.Distort(padding)
    return lambda images, draws: images  # done when the images are read


def optimizer(args: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW, with weight decay for all parameters that bound a branch's output."""
    groups = param_groups(model, args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.learning_rate)
    return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum, nesterov=args.nesterov)


def scheduler(
    args: TrainingArguments, paper: PaperArguments, optimizer: torch.optim.Optimizer, batches: int
) -> LRScheduler:
    """The learning rate schedule. Cosine advances once per optimizer step, the others once per epoch."""
    if args.lr_scheduler != "cosine":
        restarts = paper.lr_restart_milestones if args.lr_scheduler == "restarting" else paper.lr_milestones
        return RestartingLR(optimizer, paper.lr_milestones, restarts, paper.lr_factors)
    steps = math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs
    warmup = round(WARMUP_SHARE * steps) if args.num_warmup_steps is None else args.num_warmup_steps
    if warmup and warmup >= steps:
        raise ValueError(f"--num_warmup_steps {warmup} must be below the {steps} steps of the run.")
    # With --lr_decay_start 0 the rate falls directly after the warm-up.
    falling = min(round(steps * (1 - args.lr_decay_start)), steps - warmup)
    decay = {"num_decay_steps": falling, "decay_type": "cosine"}
    return get_scheduler("warmup_stable_decay", optimizer, warmup, steps, scheduler_specific_kwargs=decay)


def average(args: TrainingArguments, model: nn.Module) -> ModelEmaV3 | None:
    """The average of the weights, if requested: timm's, whose decay increases with the steps, for short runs."""
    return ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None


def pruner(
    args: Arguments, model: nn.Module, optimizer: torch.optim.Optimizer, images: ImageData, average: Any
) -> EpsilonPruner | None:
    """The pruner, or None for a training in which no branches close.

    Args:
        args: Arguments of the run.
        model: Network to train.
        optimizer: Optimizer of the network.
        images: Images for a criterion that compares branches.
        average: Average of the weights, which follows the structure; or None.
    """
    pruning = args.pruning
    if pruning.no_gates or pruning.prune_at == "start":
        return None
    ramp: dict[str, Any] = {}
    if (budget := choices.budget_of(pruning)) is not None:
        analysed = images.analysed(next(model.parameters()).device)
        ramp = {"ramp_epochs": pruning.ramp_epochs, "criterion": choices.ramp_criterion(pruning.criterion, analysed)}
        ramp[budget.argument] = pruning.keep if budget.argument == "keep" else budget
    return EpsilonPruner(
        model, optimizer, epsilon=args.paper.epsilon, warmup_epochs=pruning.epsilon_warmup_epochs,
        patience=pruning.patience, live_removal=not pruning.no_live_removal,
        followers=[] if average is None else [average], measure_always=args.checkpoints.with_tracking, **ramp,
    )  # fmt: skip


def place(model: nn.Module, args: TrainingArguments, device: torch.device) -> nn.Module:
    """Move a network to the device, and convert it to its form for training."""
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return synchronize_batchnorm(model) if args.sync_batchnorm else model
