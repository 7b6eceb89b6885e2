"""Strict ``from_pretrained`` for the code in saved directories.

The weights are compared with the network that ``config.json`` describes before transformers reads them. transformers
alone gives random numbers to what is missing, with a warning.

This file imports only modules that are copied into saved directories with it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from .config_checks import check_config
from .weight_checks import WEIGHTS, Layout, check_file, check_precision, layout_of, weight_files

__all__ = ["StrictLoading", "align_weights", "location_in"]

# Keyword arguments of from_pretrained for the location of a repository's files.
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def location_in(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``from_pretrained`` for the location of a repository's files."""
    return {key: kwargs[key] for key in _HUB_KEYWORDS if kwargs.get(key) is not None}


def align_weights(model: nn.Module) -> None:
    """Copy weights at unaligned addresses to aligned ones.

    transformers leaves CPU weights in the memory-mapped file, at unaligned addresses. There, kernels for single images
    sum in another order, so logits would differ from timm's in the last bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


class StrictLoading:
    """Mixin for a class whose next base is :class:`transformers.PreTrainedModel`.

    Attributes:
        is_cifar (bool): Whether ``model_args`` are those of a CIFAR network.
        structure_fields (tuple[str, ...]): Fields of the configuration that describe the structure.
        wrapper_prefix (str): Text before the names of the weights in the class, which the file's names lack.
    """

    is_cifar = False
    structure_fields: tuple[str, ...] = ("architecture", "model_args")
    wrapper_prefix = ""
    config_class: Any

    @classmethod
    def network_of(cls, config: Any, num_classes: int) -> nn.Module:
        """The network that a configuration describes; its weights have the names that a file has."""
        raise NotImplementedError

    @classmethod
    def classifier_names(cls, config: Any) -> set[str]:
        """The names of the classifier's weights."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Like :meth:`transformers.PreTrainedModel.from_pretrained`, but strict about the weights.

        Only the classifier may differ, with ``ignore_mismatched_sizes=True`` or if the stored network has none.

        Raises:
            ValueError: The weights do not fit ``config.json``, or contain NaN.
        """
        kwargs.setdefault("use_safetensors", True)  # other formats can hold code
        may_differ: set[str] = set()
        if kwargs.get("state_dict") is None:
            may_differ = cls._check_stored(pretrained_model_name_or_path, kwargs)
        parent: Any = super()
        loaded: Any = parent.from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = {key.removeprefix(cls.wrapper_prefix) for key in info["missing_keys"]}
        if kwargs.get("state_dict") is None and (lacking := sorted(missing - may_differ)):
            raise ValueError(f"{WEIGHTS} lacks {lacking[0]!r} and {len(lacking) - 1} more tensors of the network.")
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_stored(cls, name: Any, kwargs: dict[str, Any]) -> set[str]:
        """Compare stored weights with the network of ``config.json``. Returns the names that may differ.

        Args:
            name: First argument of ``from_pretrained``.
            kwargs: Keyword arguments of ``from_pretrained``.
        """
        where = location_in(kwargs)
        stored = cls.config_class.get_config_dict(name, **where)[0]
        stored = check_config(stored, is_cifar=lambda _: cls.is_cifar)
        given = kwargs.get("config")
        config = cls.config_class.from_dict(dict(stored))
        if isinstance(given, cls.config_class):
            for field in cls.structure_fields:
                setattr(config, field, getattr(given, field))
        num_classes = stored.get("num_classes") or 0
        with torch.device("meta"):
            network = cls.network_of(config, num_classes)
        root = os.path.join(str(name), kwargs.get("subfolder") or "")
        files = weight_files(root) if os.path.isdir(root) else [Path(str(cached_file(name, WEIGHTS, **where)))]
        is_replaced = bool(kwargs.get("ignore_mismatched_sizes")) or not num_classes

        def adapt(found: dict[str, Layout]) -> dict[str, Layout]:
            if closed := [key for key in found if key.endswith(".closed")]:
                raise ValueError(
                    f"{WEIGHTS} contains {closed[0]!r}: it is a training checkpoint, which only timm_eps reads."
                )
            return found

        may_differ = cls.classifier_names(config) if is_replaced else set()
        digest = stored.get("weights_sha256")
        check_file(files, layout_of(network.state_dict()), may_differ=may_differ, adapt=adapt, sha256=digest)
        check_precision(stored.get("dtype") or stored.get("torch_dtype"), files)
        return may_differ
