"""The arguments that affect a run: for its results, its card, and for resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .arguments import Arguments

__all__ = ["binding_arguments", "hub_id", "used_arguments"]

# Options that do not affect training beyond floating-point rounding.
_UNRELATED = (
    "cuda_graphs", "num_threads", "dataloader_num_workers", "per_device_eval_batch_size", "with_remote_code",
    "with_exported_program", "with_onnx", "with_onnx_int8",
)  # fmt: skip
# Options that do not affect the results, and local paths.
_UNSAID = (
    "config", "output_dir", "compare_dense", "dry_run", "license", "train_dir", "validation_dir", "test_dir",
    "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "with_tracking", "report_to", "logging_steps",
    "ddp_timeout",
)  # fmt: skip
# Values without information for a reader.
_PLAIN: dict[str, Any] = {
    "train_split_name": "train",
    "augmentation": "crop",
    "corrupt_images": "error",
    "eval_strategy": "epoch",
    "criterion": "response",
    "prune_at": "ramp",
    **dict.fromkeys(("label_smoothing_factor", "mixup_alpha", "cutmix_alpha"), 0.0),
}


def hub_id(name: str | None) -> str | None:
    """A name on the Hub; None for a directory, whose path is only local."""
    return None if name is None or Path(name).exists() else name


def binding_arguments(args: Arguments) -> dict[str, Any]:
    """Arguments that must be the same when a run resumes."""
    return {name: value for name, value in used_arguments(args).items() if name not in _UNRELATED}


def used_arguments(args: Arguments) -> dict[str, Any]:
    """Arguments that affect the result, without local paths and unused options."""
    flat = args.flat()
    unsaid = {*_UNSAID, *_unread(args)} | {name for name, value in _PLAIN.items() if flat[name] == value}
    unsaid |= {name for name in ("dataset_name", "model_name_or_path", "teacher") if hub_id(flat[name]) is None}
    return {
        name: value for name, value in flat.items() if value is not None and value is not False and name not in unsaid
    }


def _unread(args: Arguments) -> set[str]:
    """Arguments that are unused, given the others."""
    steps, decay = {"lr_milestones", "lr_restart_milestones", "lr_factors"}, {"lr_decay_start", "num_warmup_steps"}
    unread = {"cosine": steps, "multistep": decay | {"lr_restart_milestones"}, "restarting": decay}[
        args.training.lr_scheduler
    ]
    if args.data.augmentation == "resized_crop":
        unread |= {"padding"}
    else:
        unread |= {"color_jitter"}
        unread |= {"dataloader_num_workers"} if not args.data.streaming else set()
    if not args.data.streaming:
        unread |= {"shuffle_buffer_size"}
    if args.pruning.no_gates or args.pruning.prune_at == "start":
        unread |= {"epsilon_warmup_epochs", "ramp_epochs", "patience", "no_live_removal"}
    if args.pruning.target_latency is None:
        unread |= {"latency_batch_size"}
    if args.distillation.teacher is None:
        unread |= {"teacher_weight", "teacher_temperature"}
    if not args.training.model_ema:
        unread |= {"model_ema_decay"}
    return unread
