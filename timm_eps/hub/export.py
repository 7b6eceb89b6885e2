"""Export of pruned networks as stock timm architectures, which load without this package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TimmWrapperConfig

from ..files.standins import Passthrough
from ..hf.configuration_eps_resnet import EpsResNetConfig
from ..hf.model_files import staged
from ..hf.pretrained_eps_resnet import unshared
from ..names import base_name
from ..surgery.branches import block_path, evaluating, gates, probe_batch, timm_body
from ..surgery.removal import check_gated, collapsed_copy, natural_order, removed_slots, same_outputs

__all__ = ["export_timm"]

# Keyword arguments of timm's entrypoints for the number of blocks, per stage or in total.
_DEPTHS = ("layers", "depths", "depth")


def export_timm(model: nn.Module, directory: str | os.PathLike, *, zero_branches: bool = False) -> dict[str, Any]:
    """Save a pruned network as a stock timm architecture with fewer blocks.

    The directory loads in timm (``local-dir:``, ``hf-hub:``) and in transformers (AutoModelForImageClassification)
    without this package. The remaining blocks are renumbered. A block that keeps one of its two branches, or the
    shortcut of a stage's first block, cannot be expressed this way. Such a block can be saved in full, with zeros in
    all weights of the removed branch. This is exact, too, but neither smaller nor faster than the dense block.

    Args:
        model: A model with gates, pruned or not; it is unchanged. Closed branches are left out.
        directory: Directory to write; it is created if needed.
        zero_branches: Whether to save branches that cannot be left out as zeros.

    Returns:
        A dict: ``model_args`` has the keyword arguments of ``timm.create_model``, ``architecture`` the name, and
            ``zeroed`` the slots whose branches were saved as zeros.

    Raises:
        ValueError: The architecture is not one of timm's, or a branch cannot be left out and ``zero_branches`` was not
            given. The message names the branch and the reason.
        OSError: The directory cannot be written.

    Example::

        model = timm.create_model("eps_test_vit", num_classes=10)
        timm_eps.prune(model, ["blocks.2.drop_path1", "blocks.2.drop_path2"])
        timm_eps.export_timm(model, "plain")["model_args"]["depth"]  # 5 blocks instead of 6
    """
    check_gated(model)
    body = timm_body(collapsed_copy(model))
    config: Any = EpsResNetConfig.from_timm(body)
    architecture = base_name(config.architecture)
    if architecture == config.architecture or not timm.is_model(architecture):
        raise ValueError(f"{config.architecture} is not an architecture of timm, so stock timm cannot load it.")
    arguments = {name: value for name, value in config.model_args.items() if name != "removed"}
    options = {**arguments, "num_classes": body.num_classes}
    blocks = _removed_blocks(body)
    empty = {path for path in blocks if isinstance(body.get_submodule(path), nn.Identity | Passthrough)}
    whole = {path for path in empty if path.rpartition(".")[2].isdigit()}
    obstacles = [
        f"{path} is {'not in a sequence' if path in empty else 'not an identity'} without {', '.join(blocks[path])}"
        for path in sorted(blocks.keys() - whole, key=natural_order)
    ]
    attempts = [] if obstacles and not zero_branches else [(_left_out(body, whole, zero_branches), zero_branches)]
    if zero_branches and whole:
        attempts.append((set(), True))
    for left_out, may_zero in attempts:
        try:
            stock, depth = _rebuild(body, architecture, options, left_out, may_zero)
            break
        except ValueError as error:
            obstacles.append(str(error))
    else:
        hint = "" if zero_branches else " zero_branches=True writes such branches in full, with zeros for weights."
        raise ValueError(f"No stock {architecture} with fewer blocks computes the same: {'; '.join(obstacles)}.{hint}")

    arguments |= depth
    fields = {"pretrained_cfg": config.pretrained_cfg, "id2label": getattr(model, "config", config).id2label}
    described: Any = TimmWrapperConfig(architecture=architecture, model_args=arguments, **fields)
    with staged(directory) as staging:
        described.save_pretrained(staging)
        save_file(unshared(stock.state_dict()), staging / "model.safetensors", metadata={"format": "pt"})
    zeroed = [slot for path in blocks if path not in left_out for slot in blocks[path]]
    return {"architecture": architecture, "model_args": arguments, "zeroed": sorted(zeroed, key=natural_order)}


def _removed_blocks(body: nn.Module) -> dict[str, list[str]]:
    """The removed slots of each block, by the path of the remaining part of the block."""
    there = {path for path, _ in body.named_modules()}
    blocks: dict[str, list[str]] = {}
    for slot in removed_slots(body):
        path = slot.rpartition(".")[0]
        while path not in there:
            path = path.rpartition(".")[0]
        blocks.setdefault(path, []).append(slot)
    return blocks


def _left_out(body: nn.Module, whole: set[str], zero_branches: bool) -> set[str]:
    """The blocks to leave out: all removed ones, except one of an otherwise empty stage if it can be zeros."""
    left_out = set(whole)
    for parent in {path.rpartition(".")[0] for path in whole}:
        children = [f"{parent}.{name}" for name, _ in body.get_submodule(parent).named_children()]
        if zero_branches and left_out.issuperset(children):
            left_out.remove(children[0])
    return left_out


def _rebuild(
    body: nn.Module, architecture: str, options: dict[str, Any], left_out: set[str], zero_branches: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The stock network without these blocks, and the keyword argument for its number of blocks.

    Raises:
        ValueError: There is no such network, or its outputs differ.
    """
    state = _renumbered(body.state_dict(), left_out)
    for depth in _depth_keywords(body, left_out):
        try:
            stock = timm.create_model(architecture, **{**options, **depth})
        except Exception:  # timm's families raise various errors for an unknown keyword
            continue
        own = stock.state_dict()
        if any(key not in own or own[key].shape != tensor.shape for key, tensor in state.items()):
            continue
        if (missing := own.keys() - state.keys()) and not zero_branches:
            continue
        stock.load_state_dict(state, strict=False)
        for name, parameter in stock.named_parameters():
            if name in missing:
                nn.init.zeros_(parameter)
        stock.to(next(body.parameters())).eval()
        with evaluating(body):
            batch = probe_batch(body)
            if same_outputs(body(batch), stock(batch)):
                return stock, depth
        raise ValueError(f"with {depth or 'zeros'} the outputs differ, because its blocks depend on their position")
    if not left_out:
        raise ValueError("timm's network has other weights")
    raise ValueError(f"timm cannot build it with this number of blocks (tried: {', '.join(_DEPTHS)})")


def _depth_keywords(body: nn.Module, left_out: set[str]) -> Iterator[dict[str, Any]]:
    """Possible keyword arguments of timm's entrypoint for the number of remaining blocks."""
    if not left_out:
        yield {}
        return
    blocks = {*_removed_blocks(body), *(block_path(body, slot) for slot in gates(body))}
    stages = dict.fromkeys(path.rpartition(".")[0] for path in sorted(blocks, key=natural_order))
    counts = []
    for stage in stages:
        children = [f"{stage}.{name}" for name, _ in body.get_submodule(stage).named_children()]
        counts.append(len(set(children) - left_out))
        if not counts[-1]:
            raise ValueError(f"{stage} would have no block")
    for name in _DEPTHS:
        yield {name: counts[0] if name == "depth" else counts}


def _renumbered(state: dict[str, Tensor], left_out: set[str]) -> dict[str, Tensor]:
    """The weights under their new names, after the remaining blocks are renumbered."""
    renamed = {}
    for key, tensor in state.items():
        for stage in {path.rpartition(".")[0] for path in left_out}:
            if key.startswith(f"{stage}."):
                number, _, rest = key.removeprefix(f"{stage}.").partition(".")
                before = sum(f"{stage}.{index}" in left_out for index in range(int(number)))
                key = f"{stage}.{int(number) - before}.{rest}"
        renamed[key] = tensor
    return renamed
