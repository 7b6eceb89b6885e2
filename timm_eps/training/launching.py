"""Start the processes of a run through Accelerate, and the trackers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from ..surgery.sharding import NO_DEEPSPEED
from .arguments import Arguments, used_arguments
from .interruption import InterruptionError
from .sharded import check_sharded_options

__all__ = ["available_cores", "start_accelerator", "trackers"]


def start_accelerator(args: Arguments) -> Accelerator:
    accelerator = Accelerator(
        # Without this, processes started by torchrun on CPUs are not connected.
        cpu=not torch.accelerator.is_available(),
        # The loop divides the loss itself, because the last steps of an epoch may accumulate fewer batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="inductor" if args.training.compile else None,
        mixed_precision=args.training.mixed_precision,
        # Each process has the statistics of its own batches. They are averaged when they are needed.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.training.ddp_timeout)),
        ],
        log_with=(args.checkpoints.report_to or "all") if args.checkpoints.with_tracking else None,
        project_dir=args.output_dir,
    )
    _check_kind(args, accelerator)
    if accelerator.num_processes != (started := int(os.environ.get("WORLD_SIZE", 1))):
        raise ValueError(f"{started} processes were started, but Accelerate connected {accelerator.num_processes}.")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs an accelerator, but there is none; bf16 works on the CPU.")
    if args.training.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        raise ValueError(
            f"--cuda_graphs needs one process on an NVIDIA GPU, but this run has {accelerator.num_processes} on "
            f"{accelerator.device.type}."
        )
    if accelerator.device.type == "cpu":
        # Without an accelerator, accelerate launch limits a process to one thread.
        share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(args.training.num_threads or max(1, share))
    return accelerator


def _check_kind(args: Arguments, accelerator: Accelerator) -> None:
    """Raise ValueError if the processes do not share a model in a way that this training supports."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED" or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(NO_DEEPSPEED)
    if kind == "FSDP":
        check_sharded_options(args, accelerator)
    elif parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            f"Accelerate does not shard parameters in this run ({kind}): it does so only with several processes on "
            "accelerators. Launch without --use_fsdp."
        )
    elif kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU"):
        raise ValueError(
            f"A training under {kind} is not supported. Launch with plain data parallelism (--multi_gpu, or torchrun), "
            "or with FSDP2 (--use_fsdp --fsdp_version 2)."
        )


@contextmanager
def trackers(args: Arguments, accelerator: Accelerator) -> Iterator[None]:
    """Context in which the requested trackers log. They write their data also if the run is stopped.

    Raises:
        ValueError: A tracker is not installed.
    """
    if args.checkpoints.with_tracking:
        _start_trackers(args, accelerator)
    try:
        yield
    except InterruptionError:
        accelerator.end_training()
        raise


def _start_trackers(args: Arguments, accelerator: Accelerator) -> None:
    installed = {str(tracker) for tracker in accelerator.log_with}
    missing = [name for name in args.checkpoints.report_to or [] if name not in (*installed, "all")]
    if missing or not installed:
        raise ValueError(f"--report_to {missing[0] if missing else 'all'}: no such tracker is installed.")
    accelerator.init_trackers("timm_eps", {name: str(value) for name, value in used_arguments(args).items()})


def available_cores() -> int:
    """Number of cores that this process may use; all cores of the machine if the limit is unknown."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
