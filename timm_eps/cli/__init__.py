"""The command ``timm-eps``: the package from a shell.

A verb is a module of this folder with three names. ``HELP`` is one line. ``add_arguments(parser)`` adds the flags.
``run(args)`` does the work and returns the exit code; it imports the heavy modules. A new verb needs one such file and
one entry in :data:`VERBS`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

from ..hub.failures import one_line
from ..training.ending import as_script
from .output import UsageError

__all__ = ["VERBS", "main"]

VERBS = ("info", "analyze", "prune", "train", "export", "push", "report")

_NAME = "timm-eps"
_TRACEBACK = "TIMM_EPS_TRACEBACK"
# Libraries of the extra `train`.
_TRAIN = {"accelerate", "datasets", "matplotlib", "numpy", "PIL", "sklearn", "tqdm"}


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Words of the command line without the name of the program. Default: the words of this process.

    Returns:
        Exit code: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM.

    Example::

        from timm_eps.cli import main

        main(["--version"])  # 0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _build_parser().parse_args(words)
        args.words = words[words.index(args.verb) + 1 :]
        with _only_answer_on_stdout(args), _errors_in_one_line(args):
            return args.module.run(args)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return int(ended.code or 0)


def _build_parser() -> argparse.ArgumentParser:
    from .. import __version__

    shape: dict[str, Any] = {"formatter_class": _Wide, "allow_abbrev": False}
    parser = argparse.ArgumentParser(
        prog=_NAME,
        description="Delete unneeded residual blocks from timm models. `timm-eps VERB --help` explains a verb.",
        epilog=f"--traceback, before or after the verb, or {_TRACEBACK}=1 shows where an error was raised.",
        **shape,
    )
    parser.add_argument("--version", action="version", version=f"{_NAME} {__version__}")
    parser.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name in VERBS:
        module = import_module(f".{name}", __name__)
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP, add_help=False, **shape)
        verb.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # saves a line of the help
        verb.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        verb.set_defaults(module=module, parser=verb)
        module.add_arguments(verb)
    return parser


class _Wide(argparse.HelpFormatter):
    """Formats each flag and its help in one line, on a screen of 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


@contextmanager
def _only_answer_on_stdout(args: argparse.Namespace) -> Iterator[None]:
    """Send prints of verbs and libraries to stderr if the answer is JSON. Only :func:`.output.answer` uses stdout.

    Without ``--json``, verbs and libraries share stdout.
    """
    args.out = sys.stdout
    if not getattr(args, "json", False):
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def _errors_in_one_line(args: argparse.Namespace) -> Iterator[None]:
    """End with one line on stderr instead of a traceback, unless the user asked for the traceback.

    Raises:
        SystemExit: An error was raised.
    """
    if args.traceback or os.environ.get(_TRACEBACK, "0") not in ("", "0"):
        yield
        return
    name = f"{_NAME} {args.verb}"
    try:
        with as_script(name), _extras_named():
            yield
    except UsageError as error:
        args.parser.error(str(error))
    except Exception as error:
        kind = type(error).__name__
        raise SystemExit(f"{name}: error: {kind}: {one_line(error, limit=600)}. --traceback shows where.") from error


@contextmanager
def _extras_named() -> Iterator[None]:
    """Name the extra that installs a missing library.

    Raises:
        ImportError: A library of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _TRAIN:
            raise
        raise ImportError(f"{library} is not installed: pip install 'timm-eps[train]'") from error
