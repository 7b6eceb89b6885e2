"""``timm-eps train``: like ``train_hf.py``, with the same flags."""

from __future__ import annotations

import argparse
from importlib import import_module

from ..training.arguments.parsing import ShowDefaults, add_all_flags

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Train, or fine-tune and prune, like train_hf.py and with the same flags."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``train_hf.py``."""
    parser.usage = "timm-eps train [options]"
    parser.description = f"{HELP}\nOn several devices: accelerate launch -m train_hf [options]"
    parser.formatter_class = ShowDefaults
    add_all_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Pass the words of the command line to the script, which is a module of the wheel."""
    import_module("train_hf").main([word for word in args.words if word != "--traceback"])
    return 0
