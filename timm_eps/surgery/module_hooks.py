"""Keep the users' hooks when modules are replaced."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["carrying_hooks"]

_logger = logging.getLogger(__name__)

# Attributes in which torch stores hooks and their options. There is no public function for this.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NOTES = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


@contextmanager
def carrying_hooks(body: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Transfer the hooks of modules that are replaced in this context to their replacements.

    Args:
        body: The network.
        paths: Paths of modules whose replacements compute the same. For other modules, a warning names the hooks that
            are no longer called.
    """
    is_real = not any(parameter.is_meta for parameter in body.parameters())  # trials on meta copies need no warnings
    before = {path: module for path, module in body.named_modules() if is_real and _hooks_of(module)}
    yield
    left = set(body.modules())
    for path, old in before.items():
        if old in left:
            continue
        new = _find(body, path)
        if path in paths and new is not None:
            # The same dictionary objects, because the users' handles remove hooks from these.
            for name in (*_HOOKS, *_NOTES):
                setattr(new, name, getattr(old, name))
        else:
            names = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in _hooks_of(old))
            _logger.warning("%s was removed together with its hooks, which are no longer called: %s.", path, names)


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of a module, except torch's own hooks, which compute weights."""
    hooks = [hook for name in _HOOKS for hook in getattr(module, name).values()]
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("torch.")]


def _find(body: nn.Module, path: str) -> nn.Module | None:
    try:
        return body.get_submodule(path)
    except AttributeError:
        return None
