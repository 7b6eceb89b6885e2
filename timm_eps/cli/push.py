"""``timm-eps push``: push a saved network to the Hub in one commit."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .networks import load_saved
from .output import add_json, answer

__all__ = ["HELP", "add_arguments", "read_results", "run"]

HELP = "Push a saved network to the Hub in one commit, with its card and picture."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.usage = "timm-eps push DIRECTORY REPO_ID [options]"
    parser.add_argument("directory", metavar="DIRECTORY", help="directory of a saved network")
    parser.add_argument(
        "repo_id", metavar="REPO_ID", help="owner/name, or a name under your account; created if needed"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; default main")
    parser.add_argument("--commit_message", metavar="TEXT", default="Upload model", help="title of the commit")
    add_json(parser)
    parser.epilog = (
        "The token comes from `hf auth login` or HF_TOKEN. The results in all_results.json fill the card. "
        "ONNX, model.pt2 and remote code are pushed if the directory has them."
    )


def run(args: argparse.Namespace) -> int:
    """Load the network and push it."""
    from .. import push_to_hub
    from ..hub.remote_code import CODE_FILES
    from ..hub.saving import ONNX, ONNX_INT8, PROGRAM

    directory = Path(args.directory)
    if not directory.is_dir():
        raise ValueError(f"{args.directory[:200]!r} is not a directory.")
    if (directory / ONNX_INT8).is_file():
        print(f"{ONNX_INT8} is not pushed: it was calibrated on images that are not here.", file=sys.stderr)
    model = load_saved(args.directory)
    commit = push_to_hub(
        model,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
        results=read_results(directory),
        onnx=(directory / ONNX).is_file(),
        exported_program=(directory / PROGRAM).is_file(),
        remote_code=(directory / CODE_FILES[0]).is_file(),
    )
    assert commit is not None, "a loaded model is whole"
    found = {"repo_url": str(commit.repo_url), "commit": commit.oid, "commit_url": commit.commit_url}
    answer(args, found, f"Pushed to {commit.repo_url} ({commit.oid[:7]}).")
    return 0


def read_results(directory: Path) -> dict[str, Any] | None:
    """The content of ``all_results.json`` in a directory; None if there is no such file.

    Raises:
        ValueError: The file does not hold a JSON object.
    """
    from ..hub.saving import RESULTS

    path = directory / RESULTS
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON.") from None
    if not isinstance(results, dict):
        raise ValueError(f"{path} must hold an object, not a {type(results).__name__}.")
    return results
