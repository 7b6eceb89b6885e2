"""TorchScript and torch.fx on a network: plain, with gates, and without some of its branches.

Four tools get five states of one architecture. A tool that accepts the plain network should accept all states and give
equal outputs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import set_scriptable
from timm.models import create_feature_extractor, get_graph_node_names
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import timm_eps
from timm_eps.surgery.branches import gates, probe_batch, slots_by_block

STATES = ("open gates", "closed gates", "whole blocks removed", "half blocks removed")
Tool = Callable[[nn.Module, Tensor], Any]


def scripted(model: nn.Module, images: Tensor) -> Any:
    """Output in evaluation mode, by TorchScript."""
    return torch.jit.script(model)(images)


def traced(model: nn.Module, images: Tensor) -> Any:
    """Output in evaluation mode, by a graph of torch.fx."""
    return torch.fx.symbolic_trace(model)(images)


def traced_in_training(model: nn.Module, images: Tensor) -> Any:
    """Output in training mode, by a graph of torch.fx."""
    graph = torch.fx.symbolic_trace(model.train())
    torch.manual_seed(1)
    return graph(images)


def extracted(model: nn.Module, images: Tensor) -> Any:
    """The last node of timm's feature extraction, in evaluation mode."""
    last = get_graph_node_names(model)[1][-1]
    return create_feature_extractor(model, return_nodes=[last]).eval()(images)[last]


TOOLS: dict[str, Tool] = {
    "torch.jit.script": scripted,
    "torch.fx, evaluation": traced,
    "torch.fx, training": traced_in_training,
    "feature extraction": extracted,
}


def in_states(name: str, arguments: dict[str, Any]) -> dict[str, nn.Module]:
    """The architecture in each state, in a form that can be scripted if timm has one.

    The last branch of every second block is closed, then removed; or all branches of every second block are removed.
    """
    torch.manual_seed(0)
    with set_scriptable(True):
        plain = timm.create_model(name, **arguments).eval()
    for parameter in plain.parameters():
        if parameter.ndim <= 1:  # a branch whose last scale is zero would hide its removal
            nn.init.uniform_(parameter, 0.5, 1.5)
    gated = copy.deepcopy(plain)
    timm_eps.add_gates(gated)
    blocks = list(slots_by_block(gated, gates(gated)).values())[::2]
    models = {"plain": plain, "open gates": gated}
    for state, slots in {
        "closed gates": [own[-1] for own in blocks],
        "whole blocks removed": [slot for own in blocks for slot in own],
        "half blocks removed": [own[-1] for own in blocks],
    }.items():
        models[state] = copy.deepcopy(gated)
        for slot in slots:
            gates(models[state])[slot].closed = True
        if state != "closed gates":
            timm_eps.remove_closed(models[state])
    return models


def obstacle(tool: Tool, model: nn.Module, images: Tensor, *, training: bool) -> str | None:
    """Why a tool rejects a network or gives other outputs. None if outputs are equal."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        expected = copy.deepcopy(model).train(training)(images)
        try:
            with set_scriptable(True):
                found = tool(copy.deepcopy(model), images)
        except Exception as error:  # compilers raise any kind of error
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
    if tool is extracted:  # if a network returns several tensors, the last node is one of them
        expected = tree_leaves(expected)[-1]
    pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in pairs)
    return None if same else "it computes something else"


def try_tools(name: str, arguments: dict[str, Any]) -> dict[str, dict[str, str | None]]:
    """For each tool that accepts the plain architecture, the obstacle in each of the states."""
    models = in_states(name, arguments)
    images = probe_batch(models["plain"])
    found: dict[str, dict[str, str | None]] = {}
    for label, tool in TOOLS.items():
        training = tool is traced_in_training
        if obstacle(tool, models["plain"], images, training=training) is None:
            others = {state: model for state, model in models.items() if state != "plain"}
            found[label] = {state: obstacle(tool, model, images, training=training) for state, model in others.items()}
    return found
