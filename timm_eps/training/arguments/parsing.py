"""Parse the command line and a configuration file into the arguments of a run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ...budget import BUDGETS
from .arguments import Arguments
from .checks import check_directories, check_pairs, check_together
from .defaults import fill_in
from .options import add_flags

__all__ = ["ShowDefaults", "add_all_flags", "build_parser", "parse_arguments"]


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> Arguments:
    """The arguments of a run, with all checks that need no data or model. Exits with a message if they are wrong.

    Args:
        argv: Words of the command line; by default those of this process.
        description: First text of ``--help``.

    Raises:
        ValueError: The file of ``--config`` is not an object of arguments.
    """
    parser = build_parser(description)
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    namespace = parser.parse_args([*read_config(given), *argv]) if given.config else given
    args = Arguments.of(vars(namespace))
    try:
        check_pairs(args.flat())
        fill_in(args)
        check_together(args)
        check_directories(args.data)
    except ValueError as error:
        parser.error(str(error))
    return args


class ShowDefaults(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default that is a value. Flags, and defaults that depend on other options, have their own text."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False) or action.help is None or "default" in action.help:
            return action.help or ""
        return super()._get_help_string(action) or ""


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line, with a group of flags for each group of arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=ShowDefaults, allow_abbrev=False)
    add_all_flags(parser)
    return parser


def add_all_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run to a parser, in groups."""
    add_flags(parser, Arguments)
    for kind in Arguments.groups().values():
        add_flags(parser.add_argument_group(kind.title), kind)


def read_config(given: argparse.Namespace) -> list[str]:
    """The arguments in a configuration file as words of a command line, without those that flags replace."""
    path = given.config
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {path} is not JSON: {error}.") from error
    if not isinstance(stored, dict):
        raise ValueError(f"--config {path} must contain an object of arguments by name, not a {type(stored).__name__}.")
    if unknown := sorted(stored.keys() - vars(given).keys()):
        raise ValueError(f"--config {path} contains {unknown[0]!r}, which is not an argument; see train_hf.py --help.")
    has_budget = any(getattr(given, name) is not None for name in BUDGETS)
    if has_budget or given.epsilon is not None or given.no_gates:
        replaced = {*BUDGETS, "epsilon", "no_gates"} | (set() if has_budget else {"criterion", "prune_at"})
        stored = {name: value for name, value in stored.items() if name not in replaced}
    arguments = []
    for name, value in stored.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words = (json.dumps(one) if isinstance(one, dict) else str(one) for one in values if one is not True)
            arguments += [f"--{name}", *words]
    return arguments
