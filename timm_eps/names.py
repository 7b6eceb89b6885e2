"""Names: a gated architecture is called like timm's own with ``eps_`` before it, its twin."""

from __future__ import annotations

__all__ = ["CIFAR_DEPTHS", "PREFIX", "base_name", "is_cifar_network", "note_original", "twin_name"]

PREFIX = "eps_"
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 200, 302, 500, 752)
# timm has a ResNet-200 for ImageNet; the paper's network of that depth, for CIFAR, has the plain name here.
_RENAMED = {"resnet200": "eps_resnet200_imagenet"}
_ORIGINAL = {twin: base for base, twin in _RENAMED.items()}


def twin_name(architecture: str) -> str:
    """The name of the gated twin of a timm architecture; that of a twin is its own."""
    return architecture if architecture.startswith(PREFIX) else _RENAMED.get(architecture, PREFIX + architecture)


def base_name(architecture: str) -> str:
    """The name of the timm architecture that a twin gates; that of a network which is no twin is its own."""
    if is_cifar_network(architecture):
        return architecture
    return _ORIGINAL.get(architecture, architecture.removeprefix(PREFIX))


def note_original(architecture: str) -> None:
    """Note that a name with ``eps_`` is of no twin: timm has no such network without gates."""
    _ORIGINAL[architecture] = architecture


def is_cifar_network(architecture: str) -> bool:
    """Whether a name is one of the paper's CIFAR networks, not of a twin of a timm architecture."""
    return architecture in {f"{PREFIX}resnet{depth}" for depth in CIFAR_DEPTHS}
