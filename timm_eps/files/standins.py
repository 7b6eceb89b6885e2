"""Modules that replace removed ones.

The code around a removed module still calls it, with named arguments. A stand-in therefore has the same signature as
the module that it replaces. TorchScript compiles the source of ``forward`` and does not support ``*args``, so
``forward`` is generated for each signature.
"""

import functools
import inspect
import itertools
import linecache
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["Chain", "Passthrough", "ZeroBranch"]

_number = itertools.count()


class ZeroBranch(nn.Module):
    """Replacement for the module in the slot of a removed branch: zero, to which the shortcut is added.

    Args:
        shape: Shape of the zeros, with None for the sizes of the input; by default a single zero.
    """

    sizes: list[int]

    def __init__(self, shape: tuple[int | None, ...] = ()) -> None:
        super().__init__()
        self.shape = shape
        # TorchScript has no list of numbers and None.
        self.sizes = [-1 if size is None else size for size in shape]

    def forward(self, x: Tensor) -> Tensor:
        sizes = [x.shape[i] if size < 0 else size for i, size in enumerate(self.sizes)]
        return x.new_zeros(sizes)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class Passthrough(nn.Module):
    """An identity for modules with several arguments or several outputs.

    Args:
        like: Class of the replaced module.
        take: Position of the argument to return, or a tuple of positions to return a tuple.
    """

    def __new__(cls, like: Any, take: int | tuple[int, ...] = 0) -> "Passthrough":
        written: type[Passthrough] = _written(Passthrough, like, take)
        return super().__new__(written)

    def __init__(self, like: type[nn.Module], take: int | tuple[int, ...] = 0) -> None:
        super().__init__()
        self.like = like
        self.take = take

    def __reduce__(self) -> tuple[Any, ...]:
        return Passthrough, (self.like, self.take), vars(self)

    def extra_repr(self) -> str:
        return f"take={self.take}"


class Chain(nn.Sequential):
    """A sequence with further arguments; the first argument is its input.

    Args:
        like: Class of the replaced module.
    """

    def __new__(cls, like: Any) -> "Chain":
        written: type[Chain] = _written(Chain, like, None)
        return super().__new__(written)

    def __init__(self, like: type[nn.Module]) -> None:
        super().__init__()
        self.like = like

    def __reduce__(self) -> tuple[Any, ...]:
        return Chain, (self.like,), vars(self)


@functools.cache
def _written(base: type, like: Any, take: int | tuple[int, ...] | None) -> type[Any]:
    """A subclass of ``base`` whose ``forward`` has the same signature as ``like.forward``.

    Without ``take`` it runs its children in order, which TorchScript supports for subclasses of ``nn.Sequential``.
    """
    signature = inspect.signature(like.forward)
    arguments = list(signature.parameters.values())[1:]
    if take is None:
        x = _argument(arguments, 0)
        body = [f"for _child in self: {x} = _child({x})", f"return {x}"]
    elif isinstance(take, int):
        body = [f"return {_argument(arguments, take)}"]
    else:
        body = [f"return ({''.join(f'{_argument(arguments, position)}, ' for position in take)})"]
    forward = _compiled(signature, body, inspect.unwrap(like.forward).__globals__)
    return type(base.__name__, (base,), {"forward": forward, "__module__": __name__, "__doc__": base.__doc__})


def _argument(arguments: list[inspect.Parameter], position: int) -> str:
    """The expression for a positional argument."""
    for i, argument in enumerate(arguments):
        if argument.kind is argument.VAR_POSITIONAL:
            return f"{argument.name}[{position - i}]"
        if i == position:
            return argument.name
    raise IndexError(f"no argument has position {position}")


def _compiled(signature: inspect.Signature, body: list[str], known: dict[str, Any]) -> Callable[..., Any]:
    """A function ``forward`` with this signature, whose source can be read.

    Annotations that are strings (``from __future__ import annotations``) are looked up in ``known``.
    """
    names: dict[str, Any] = {}

    def named(value: Any) -> Any:
        if value is signature.empty:
            return value
        names[name := f"_{len(names)}"] = value
        return _Name(name)

    def annotation(value: Any) -> Any:
        try:
            return named(eval(value, known) if isinstance(value, str) else value)
        except NameError:  # imported only for type checkers
            return signature.empty

    parameters = signature.parameters.values()
    written = signature.replace(
        parameters=[p.replace(annotation=annotation(p.annotation), default=named(p.default)) for p in parameters],
        return_annotation=annotation(signature.return_annotation),
    )
    source = "\n    ".join([f"def forward{written}:", *body]) + "\n"
    # There is no file with this name. TorchScript and debuggers find the source in the cache.
    filename = f"<timm_eps stand-in {next(_number)}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    exec(compile(source, filename, "exec"), names)
    forward: Callable[..., Any] = names["forward"]
    return forward


class _Name:
    """An object whose representation in a signature is an identifier."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name
