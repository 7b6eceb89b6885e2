"""The network argument of a verb: a directory, a model on the Hub, or an architecture of timm."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..names import twin_name

if TYPE_CHECKING:
    from ..training.arguments import ModelArguments

__all__ = ["add_model", "check_name", "load_model", "load_saved", "model_fields"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument MODEL and ``--pretrained``."""
    parser.add_argument("model", metavar="MODEL", help="a directory, an id on the Hub, or an architecture of timm")
    parser.add_argument("--pretrained", action="store_true", help="load timm's pretrained weights for the architecture")


def check_name(name: str) -> None:
    """Check the name of a saved model.

    Raises:
        ValueError: The name is neither a directory nor an id such as ``owner/name``.
    """
    if not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
        raise ValueError(f"{name[:200]!r} is not a directory and not an id on the Hub, such as owner/name.")


def model_fields(args: argparse.Namespace) -> dict[str, Any]:
    """MODEL and ``--pretrained`` as fields of :class:`~timm_eps.training.arguments.ModelArguments`.

    Raises:
        ValueError: MODEL is of no known kind, or does not allow ``--pretrained``.
    """
    import timm

    twin = twin_name(args.model.partition(".")[0])
    if not Path(args.model).is_dir() and timm.is_model(twin):
        tag = args.model.partition(".")[2]
        return {"architecture": f"{twin}.{tag}" if tag else twin, "pretrained": args.pretrained}
    if args.pretrained:
        raise ValueError(f"--pretrained needs an architecture of timm, got {args.model[:200]!r}.")
    if not Path(args.model).is_dir() and not _HUB_ID.fullmatch(args.model):
        raise ValueError(
            f"{args.model[:200]!r} is not a directory, an id on the Hub such as owner/name, or an architecture of timm "
            "with residual branches, such as resnet18."
        )
    return {"model_name_or_path": args.model}


def load_model(fields: ModelArguments) -> Any:
    """A transformers model of this package with its own configuration, in evaluation mode on the CPU.

    Args:
        fields: Result of :func:`model_fields`, as :class:`~timm_eps.training.arguments.ModelArguments`.
    """
    import timm

    from .. import EpsResNetForImageClassification

    if fields.model_name_or_path:
        return load_saved(fields.model_name_or_path)
    return EpsResNetForImageClassification.from_timm(timm.create_model(fields.name, pretrained=fields.pretrained))


def load_saved(name: str) -> Any:
    """A saved model in evaluation mode on the CPU: a model of this package, or a stock timm model, which gets gates.

    Args:
        name: A directory, or an id on the Hub.

    Raises:
        ValueError: The configuration or the weights are invalid; see
            :meth:`~timm_eps.hf.pretrained_eps_resnet.EpsResNetPreTrainedModel.from_pretrained`.
        OSError: There is no such model.
    """
    from transformers.utils import logging

    from .. import EpsResNetConfig, EpsResNetForImageClassification, EpsResNetModel

    check_name(name)
    logging.disable_progress_bar()
    config = EpsResNetConfig.from_pretrained(name)
    return (EpsResNetForImageClassification if config.num_labels else EpsResNetModel).from_pretrained(name).eval()
