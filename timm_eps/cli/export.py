"""``timm-eps export``: write a saved network in a form that loads without timm_eps."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .networks import load_saved
from .output import UsageError, add_json, answer, size_text

__all__ = ["FORMATS", "HELP", "Format", "add_arguments", "run"]

HELP = "Write a saved network in a form that loads without timm_eps."


class Format(NamedTuple):
    """An output format.

    Attributes:
        help: Description for the help text.
        write: Function of the loaded model and the arguments. It writes ``args.output`` and returns the fields of the
            JSON answer besides format, path and size.
    """

    help: str
    write: Callable[[Any, argparse.Namespace], dict[str, Any]]


def _timm(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    from .. import export_timm

    return export_timm(model, args.output, zero_branches=args.zero_branches)


def _onnx(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    from .. import export_onnx

    export_onnx(model, args.output)
    return {}


def _program(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    from .. import export_program

    export_program(model, args.output)
    return {}


def _remote_code(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    from .. import save_pretrained

    save_pretrained(model, args.output, remote_code=True)
    return {}


# A new format needs one entry here.
FORMATS: dict[str, Format] = {
    "timm": Format("a directory that stock timm and stock transformers load", _timm),
    "remote_code": Format("a directory that transformers loads with trust_remote_code=True", _remote_code),
    "torch": Format("a program (.pt2) that plain torch loads", _program),
    "onnx": Format("one file, pixel_values to logits, for any batch size", _onnx),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.usage = "timm-eps export DIRECTORY|ID --format FORMAT --output PATH [options]"
    parser.add_argument("model", metavar="DIRECTORY|ID", help="a saved network, or its id on the Hub")
    listed = "; ".join(f"{name}: {form.help}" for name, form in FORMATS.items())
    parser.add_argument("--format", choices=list(FORMATS), required=True, help=listed)
    parser.add_argument("--output", metavar="PATH", required=True, help="directory or file to write")
    parser.add_argument(
        "--zero_branches", action="store_true", help="timm: write branches as zeros if the architecture needs them"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Load the network, write it, and print a summary."""
    if args.zero_branches and args.format != "timm":
        raise UsageError("--zero_branches needs --format timm")
    about = FORMATS[args.format].write(load_saved(args.model), args)
    written = Path(args.output)
    files = [path for path in written.rglob("*") if path.is_file()] if written.is_dir() else [written]
    size = sum(path.stat().st_size for path in files)
    found = {"format": args.format, "output": args.output, "bytes": size, **about}
    lines = [f"{args.output}: {size_text(size)}, {FORMATS[args.format].help}"]
    if "architecture" in about:
        lines.append(f"It is timm's {about['architecture']} with {about['model_args'] or 'all its blocks'}.")
    if zeroed := about.get("zeroed"):
        lines.append(f"Branches written as zeros, neither smaller nor faster: {', '.join(zeroed)}")
    answer(args, found, "\n".join(lines))
    return 0
