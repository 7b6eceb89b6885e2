"""Find the dependencies of a forward pass without computing it.

A copy of a model on the meta device has shapes and an autograd graph, but no values and no memory. The output depends
on everything that its graph leads back to, for any weights and any images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .sharding import is_sharded_tensor, plain_copy, refuse_sharded

__all__ = [
    "Call",
    "Trace",
    "converted",
    "fresh",
    "leads_to",
    "meta_copy",
    "random_copy",
    "shapes",
    "shared_copy",
    "tensors",
    "trace",
]

_Module = TypeVar("_Module", bound=nn.Module)


class Call(NamedTuple):
    """One call of a module, and whether the output of the network depends on it."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any
    counts: bool = True


class Trace(NamedTuple):
    """One forward pass: its output, all module calls in order, and the ids of everything the output depends on."""

    output: Any
    calls: list[Call]
    live: set[int]
    by_module: dict[int, list[Call]]

    def calls_of(self, module: nn.Module) -> list[Call]:
        """The calls of one module."""
        return self.by_module.get(id(module), [])


def trace(module: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    """Run a module of a meta copy once, with the autograd graph."""
    calls: list[Call] = []

    def mark(called: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        marked = converted(output, _noted)
        # The containers are copied, because a caller may append to a list that it passed.
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        calls.append(Call(called, args, kwargs, marked))
        return marked

    hooks = [part.register_forward_hook(mark, with_kwargs=True) for part in module.modules()]
    try:
        output = module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    graph = _graph_of(output)
    judged = [call._replace(counts=any(x.grad_fn in graph for x in tensors(call.output))) for call in calls]
    by_module: dict[int, list[Call]] = {}
    for call in judged:
        by_module.setdefault(id(call.module), []).append(call)
    live = _leaves(graph) | {id(call.module) for call in judged if call.counts}
    return Trace(output, judged, live, by_module)


def _noted(tensor: Tensor) -> Tensor:
    """A copy with its own node in the graph, for modules that return their input or a constant."""
    return (tensor if tensor.requires_grad else tensor.detach().requires_grad_()).clone()


def leads_to(tree: Any) -> set[int]:
    """The ids of the leaf tensors in the autograd graph of a tree of tensors."""
    return _leaves(_graph_of(tree)) | {id(x) for x in tensors(tree) if x.requires_grad and x.is_leaf}


def _graph_of(tree: Any) -> set[Any]:
    """All nodes of the autograd graph of a tree of tensors."""
    graph: set[Any] = set()
    pending = [tensor.grad_fn for tensor in tensors(tree)]
    while pending:
        node = pending.pop()
        if node is not None and node not in graph:
            graph.add(node)
            pending.extend(parent for parent, _ in node.next_functions)
    return graph


def _leaves(graph: set[Any]) -> set[int]:
    return {id(node.variable) for node in graph if hasattr(node, "variable")}


def meta_copy(module: _Module) -> _Module:
    """A copy on the meta device in evaluation mode, with all parameters in the graph. It takes no memory."""
    return _copy(module, _on_meta).eval()


def shared_copy(module: _Module) -> _Module:
    """A copy in evaluation mode with new modules and shared tensors. Closing its gates does not affect the original.

    It takes hardly any memory. Users' hooks are left out.

    Raises:
        ValueError: The model is sharded, so that no process has whole tensors to share.
    """
    refuse_sharded(module, "A network cannot be evaluated without some of its branches")
    return _copy(module, lambda tensor: tensor).eval()


def random_copy(module: _Module) -> _Module:
    """A copy on the CPU in evaluation mode with random values, so that equal outputs are not an accident."""
    generator = torch.Generator().manual_seed(0)

    def convert(tensor: Tensor) -> Tensor:
        numbers = _random(tensor, generator)
        return numbers.abs() + 0.5 if _is_float(tensor) else numbers  # variances, among others, must be positive

    return _copy(module, convert).eval()


def random_like(tree: Any) -> Any:
    """Random values on the CPU with the shapes of a tree's tensors."""
    generator = torch.Generator().manual_seed(1)
    return tree_map(lambda leaf: _random(leaf, generator) if isinstance(leaf, Tensor) else leaf, tree)


def fresh(tree: Any) -> tuple[Any, set[int]]:
    """A copy of a tree of tensors that starts a new graph, and the ids of its leaves."""
    leaves = [torch.empty_like(tensor).requires_grad_() for tensor in tensors(tree)]
    following = iter(leaves)
    # Times one, because blocks may change their input in place, which torch forbids for leaves.
    return converted(tree, lambda tensor: next(following) * 1), {id(leaf) for leaf in leaves}


def converted(tree: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """The tree with ``convert`` applied to its floating-point tensors."""
    if _is_float(tree):  # the most frequent case
        return convert(tree)
    return tree_map(lambda leaf: convert(leaf) if _is_float(leaf) else leaf, tree)


def tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    return [tree] if _is_float(tree) else [leaf for leaf in tree_leaves(tree) if _is_float(leaf)]


def shapes(tree: Any) -> Any:
    """The tree with every tensor replaced by its shape and dtype."""
    return tree_map(lambda leaf: (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf, tree)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _on_meta(tensor: Tensor) -> Tensor:
    if is_sharded_tensor(tensor):  # its shape is that of the whole
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta")


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    return torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.dtype)


def _copy(module: _Module, convert: Callable[[Tensor], Tensor]) -> _Module:
    duplicate = plain_copy(module, convert, trains_all=True)
    for part in duplicate.modules():
        # Users' hooks are not meant for such runs. torch's own hooks compute weights.
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not getattr(hook, "__module__", "").startswith("torch."):
                    del hooks[key]
    return duplicate
