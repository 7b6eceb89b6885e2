"""Networks as programs of ``torch.export``, which need nothing but torch."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ..surgery.branches import probe_batch, timm_body
from ..surgery.removal import check_gated, collapsed_copy

__all__ = ["export_program"]


def export_program(model: nn.Module, path: str | os.PathLike) -> None:
    """Write what a model evaluates to as one file for plain torch: images (B, C, H, W) to logits, for any B.

    Example::

        timm_eps.export_program(model, "model.pt2")

        program = torch.export.load("model.pt2").module()  # elsewhere, without timm and this package
        logits = program(images)

    The images have the height and width that the model is configured for. The file is for the device of the model.

    Args:
        model: A model with gates, pruned or not; it is unchanged.
        path: Path of the file, which ends in ``.pt2``; its directory is made.

    Raises:
        ValueError: The model has no gates, the path does not end in ``.pt2``, or torch cannot trace the model for
            batches of any size.
    """
    check_gated(model)
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, as torch asks of such files, got {path.name!r}.")
    body = timm_body(collapsed_copy(model))
    try:
        with torch.no_grad():
            program = torch.export.export(
                body, (probe_batch(body),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
            )
    except Exception as error:  # torch raises errors of many kinds here
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"torch.export cannot trace this {type(body).__name__}: {reason}.") from error
    # Lines of code and their paths on this machine do not belong into the file.
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    program.example_inputs = None  # the probe's images would be written too
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
