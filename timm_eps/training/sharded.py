"""A training whose parameters are sharded over the processes by FSDP2, through Accelerate."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from ..surgery.sharding import NO_FSDP1
from .arguments import Arguments

__all__ = ["CHECKPOINT_FILES", "check_sharded_options", "checkpoint_files"]

# Files that every checkpoint must contain, for any list of files.
CHECKPOINT_FILES = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "training.json")


def check_sharded_options(args: Arguments, accelerator: Accelerator) -> None:
    """Check the options of a run with sharded parameters, and prepare Accelerate's plugin.

    Raises:
        ValueError: It is FSDP1, or an option does not work with sharded parameters.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(NO_FSDP1)
    training = args.training
    reasons = {
        "model_ema": "the average would need the whole weights in each process",
        "channels_last": "torch shards only weights in the usual memory format",
        "compile": "it was never tested there",
        "cuda_graphs": "the exchange of weights cannot be recorded",
    }
    for name, reason in reasons.items():
        if getattr(training, name):
            raise ValueError(f"--{name} does not work with sharded parameters (--use_fsdp): {reason}. Leave it out.")
    # Otherwise only the first process of a machine loads weights, and torch cannot distribute batch norm's buffers.
    plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def checkpoint_files() -> tuple[str, ...]:
    """Files that every checkpoint of this run must contain. Accelerate names those of sharded parameters otherwise."""
    return CHECKPOINT_FILES[2:] if parse_flag_from_env("ACCELERATE_USE_FSDP") else CHECKPOINT_FILES
