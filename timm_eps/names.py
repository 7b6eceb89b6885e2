"""Names of twins: the gated version of a timm architecture has the same name with the prefix ``eps_``."""

from __future__ import annotations

__all__ = ["CIFAR_DEPTHS", "PREFIX", "base_name", "is_cifar_network", "note_original", "twin_name"]

PREFIX = "eps_"
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 200, 302, 500, 752)
# timm has a ResNet-200 for ImageNet. Here the plain name means the paper's CIFAR network of that depth.
_RENAMED = {"resnet200": "eps_resnet200_imagenet"}
_ORIGINAL = {twin: base for base, twin in _RENAMED.items()}


def twin_name(architecture: str) -> str:
    """The name of the gated twin of a timm architecture. The name of a twin is returned unchanged."""
    return architecture if architecture.startswith(PREFIX) else _RENAMED.get(architecture, PREFIX + architecture)


def base_name(architecture: str) -> str:
    """The name of the timm architecture of a twin. Any other name is returned unchanged."""
    if is_cifar_network(architecture):
        return architecture
    return _ORIGINAL.get(architecture, architecture.removeprefix(PREFIX))


def note_original(architecture: str) -> None:
    """Note that a name with ``eps_`` is not a twin, because timm has no such network without gates."""
    _ORIGINAL[architecture] = architecture


def is_cifar_network(architecture: str) -> bool:
    """Whether a name is one of the paper's CIFAR networks, not of a twin of a timm architecture."""
    return architecture in {f"{PREFIX}resnet{depth}" for depth in CIFAR_DEPTHS}
