"""Checks of configuration files: they may only describe structure.

A ``config.json`` from an unknown source determines how a network is built. It must not choose the source of weights,
paths of written files, the device, or the form of the output; only the caller may. Numbers have limits, so that a small
file cannot request gigabytes.

This file imports only ``value_checks`` from the package: copies of both are saved with the stand-alone code on the Hub.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .value_checks import check_rate, check_text, check_whole, check_wholes, is_number, listed, refuse, shortened

__all__ = [
    "MAX_CLASSES",
    "check_config",
    "check_label_names",
    "check_model_args",
    "check_network",
    "check_slots",
    "without_classes",
]

MAX_CLASSES = 1_000_000
_MAX_BLOCKS = 1024  # of a stage
_MAX_CHANNELS = 4096
_MAX_SIDE = 4096  # pixels
_MAX_SLOTS = 10_000

_SLOT = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_KEYWORD = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)

# Further arguments of timm. They choose sources, files, devices, classes or the form of the output.
_NOT_STRUCTURE = re.compile(
    r"(?!\w*drop_path$|pretrained_window_sizes?$)"  # arguments of networks with similar names
    r"(pretrained\w*|(\w+_)?(cfg|url|file|filename|dir|device|dtype|source|checkpoint|cache|weights|hub_id)(_\w+)?"
    r"|(\w+_)?path|features_only|out_indices|feature_cls|num_classes|kwargs_filter|scriptable|exportable|no_jit"
    r"|state_dict|custom_load|variant|model_name|architecture|pruned|label_\w+|hf_\w+|args|kwargs|self)",
    re.ASCII,
)
# Similar fields at the root, where transformers reads them.
_NOT_AT_ROOT = re.compile(
    r"quantization_config|\w*(attn|attention|experts)_implementation\w*|\w*(kernel|device|cache_dir|adapter)\w*|\w+_plan"
    r"|closed|removed|pretrained|state_dict|url|file|source|hf_hub_id|hf_hub_filename|custom_load|label_offset"
    r"|pretrained_cfg_overlay|checkpoint_path|per_layer_config|network|stage_names|num_hidden_layers",
    re.ASCII,
)
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset"}


def check_slots(name: str, slots: object) -> list[str]:
    """Return a list of slot paths, such as ``stages.1.blocks.4.drop_path``.

    Raises:
        ValueError: ``slots`` is not a collection of such paths, or contains one of them twice.
    """
    if isinstance(slots, str | bytes | Mapping) or not hasattr(slots, "__iter__"):
        raise refuse(name, "a list of slot paths", slots)
    found = list(slots)
    if len(found) > _MAX_SLOTS:
        raise ValueError(f"{name} must be a list of at most {_MAX_SLOTS} slot paths, got {len(found)}.")
    for slot in found:
        if not (isinstance(slot, str) and len(slot) <= 256 and _SLOT.fullmatch(slot)):
            raise refuse(name, "a list of slot paths such as 'stages.1.blocks.4.drop_path'", slot)
    if len(set(found)) < len(found):
        twice = next(slot for slot in found if found.count(slot) > 1)
        raise ValueError(f"{name} must name each slot once, got {shortened(twice)} twice.")
    return found


def check_network(
    layers: object, channels: object, in_chans: object = 3, pixel_mean: object = None, *, prefix: str = ""
) -> None:
    """Check the shape of a CIFAR network.

    Args:
        layers: Number of blocks in each stage.
        channels: Width of each stage, of the same length as ``layers``.
        in_chans: Number of image channels.
        pixel_mean: Height and width of the images, or None.
        prefix: Text before the name of the field in a message.

    Raises:
        ValueError: A value is not a number or out of bounds, or the lengths differ.
    """

    def named(field: str) -> str:
        return f"{prefix}[{field!r}]" if prefix else field

    check_wholes(named("layers"), layers, 1, _MAX_BLOCKS, range(1, 9))
    check_wholes(named("channels"), channels, 1, _MAX_CHANNELS, range(1, 9))
    if (stages := len(listed(layers))) != len(listed(channels)):
        raise ValueError(
            f"{named('channels')} must have one width for each of the {stages} stages of "
            f"layers={shortened(layers)}, got {shortened(channels)}."
        )
    check_whole(named("in_chans"), in_chans, 1, _MAX_CHANNELS)
    if pixel_mean is not None:
        check_wholes(named("pixel_mean"), pixel_mean, 1, _MAX_SIDE, range(2, 3))


def _check_choice(*choices: str) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if value not in choices:
            raise refuse(name, f"one of {', '.join(map(repr, choices))}", value)

    return check


# Arguments of a CIFAR network that a file may set. Layers have timm's names, never import paths.
_CIFAR_ARGS: dict[str, Callable[[str, Any], object]] = {
    "layers": lambda name, value: None,  # together with the channels, by check_network
    "channels": lambda name, value: None,
    "in_chans": lambda name, value: None,
    "pixel_mean": lambda name, value: None,
    "removed": check_slots,
    "closed": check_slots,
    "global_pool": _check_choice("avg", "max", "avgmax", "catavgmax", ""),
    "drop_rate": check_rate,
    "drop_path_rate": check_rate,
    "norm_layer": check_text,
    "act_layer": check_text,
}


def check_model_args(model_args: object, *, is_cifar: bool) -> dict[str, Any]:
    """Check and return the ``model_args`` of a configuration file, which may only describe structure.

    Args:
        model_args: Arguments in the file; None if there are none.
        is_cifar: Whether the network is one of the CIFAR networks, which have a fixed list of arguments. The twins
            have the arguments of timm's networks.

    Raises:
        ValueError: An argument is unknown, chooses anything except structure, or has a value out of bounds. The message
            names it.
    """
    if model_args is None:
        return {}
    if not isinstance(model_args, Mapping):
        raise refuse("model_args", "an object with keyword arguments of the network", model_args)
    for name, value in model_args.items():
        field = f"model_args[{shortened(name)}]"
        if not (isinstance(name, str) and _KEYWORD.fullmatch(name)):
            raise ValueError(f"{field} is not a keyword argument of a network.")
        if is_cifar and name not in _CIFAR_ARGS:
            raise ValueError(f"{field} is not an argument of a CIFAR network; these are {', '.join(_CIFAR_ARGS)}.")
        if not is_cifar and _NOT_STRUCTURE.fullmatch(name):
            raise ValueError(
                f"{field} is refused: a configuration file may describe structure, but not sources, files, devices, "
                "classes or the form of the output. Pass it to the loading function."
            )
        if is_cifar and value is not None:
            _CIFAR_ARGS[name](field, value)
        elif name in ("removed", "closed"):
            check_slots(field, () if value is None else value)
        else:
            _check_plain(field, value)
    if is_cifar:
        given = {name: value for name, value in model_args.items() if value is not None}
        channels = given.get("channels", (16, 32, 64))
        # Without layers the name determines them: the same number in each of the three stages.
        check_network(
            given.get("layers", (1, 1, 1)), channels, given.get("in_chans", 3), given.get("pixel_mean"),
            prefix="model_args",
        )  # fmt: skip
    return dict(model_args)


def without_classes(model_args: object, num_classes: object) -> Any:
    """``model_args`` without the number of classes, which timm's saver repeats there, if both numbers are equal."""
    if isinstance(model_args, Mapping) and num_classes is not None and model_args.get("num_classes") == num_classes:
        return {name: value for name, value in model_args.items() if name != "num_classes"}
    return model_args


def _check_plain(name: str, value: object, depth: int = 0) -> None:
    """Check the value of a timm argument that is unknown here: it must be plain data of limited size."""
    if depth > 8:
        raise refuse(name, "nested at most 8 deep", value)
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int | float):
        counts_blocks = any(part in name for part in ("depth", "layers", "blocks", "repeat", "multiplier"))
        most = _MAX_BLOCKS if counts_blocks else _MAX_SIDE if "img_size" in name else 2**20
        if not is_number(value, -most, most):
            raise refuse(name, f"a number of at most {most}", value)
    elif isinstance(value, str):
        check_text(name, value, 1000)
    elif isinstance(value, list | tuple):
        if len(value) > 1000:
            raise refuse(name, "a list of at most 1000 values", value)
        for item in value:
            _check_plain(name, item, depth + 1)
    elif isinstance(value, Mapping):
        if len(value) > 1000:
            raise refuse(name, "an object of at most 1000 values", value)
        for key, item in value.items():
            if not isinstance(key, str) or _NOT_STRUCTURE.fullmatch(key):
                raise ValueError(f"{name}[{shortened(key)}] is refused: it does not describe structure.")
            _check_plain(f"{name}[{shortened(key)}]", item, depth + 1)
    else:
        raise refuse(name, "plain data", value)


def _check_size(name: str, value: object) -> None:
    check_wholes(name, value, 1, _MAX_SIDE * 4, range(3, 4))


def _check_statistics(name: str, value: object) -> None:
    numbers = listed(value)
    if not isinstance(value, list | tuple) or len(value) not in range(1, _MAX_CHANNELS + 1):
        raise refuse(name, "a list with one number for each image channel", value)
    if not all(is_number(number, -1e6, 1e6) for number in numbers):
        raise refuse(name, "a list of finite numbers", value)
    if name.endswith("['std']") and not all(number > 0 for number in numbers):
        raise refuse(name, "a list of positive numbers", value)


def _check_share(name: str, value: object) -> None:
    if not is_number(value, 1e-3, 100.0):
        raise refuse(name, "a share of the image's side", value)


def _check_layers_named(name: str, value: object) -> None:
    for layer in listed(value):
        check_text(name, layer, 256)


_PRETRAINED_CFG: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), _check_size),
    **dict.fromkeys(
        ("pool_size", "test_pool_size"), lambda name, value: check_wholes(name, value, 1, _MAX_SIDE, range(1, 4))
    ),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), _check_share),
    **dict.fromkeys(("mean", "std"), _check_statistics),
    **dict.fromkeys(("first_conv", "classifier"), _check_layers_named),
    "num_classes": lambda name, value: check_whole(name, value, 0, MAX_CLASSES),
    "label_names": lambda name, value: check_label_names(name, value),
    "fixed_input_size": _check_choice(True, False),  # type: ignore[arg-type]
    **dict.fromkeys(
        ("architecture", "tag", "interpolation", "crop_mode", "license", "description", "origin_url", "paper_name",
         "paper_ids", "notes", "label_descriptions"),
        lambda name, value: None,  # texts without effect, except the first four
    ),
    **dict.fromkeys(("architecture", "tag", "interpolation", "crop_mode"), check_text),
}  # fmt: skip


def _check_pretrained_cfg(cfg: object) -> None:
    if not isinstance(cfg, Mapping):
        raise refuse("pretrained_cfg", "an object that describes the input", cfg)
    for name, value in cfg.items():
        field = f"pretrained_cfg[{shortened(name)}]"
        if name in _SOURCES:
            if value:
                raise ValueError(f"{field} is refused: a configuration file must not choose the source of weights.")
        elif name not in _PRETRAINED_CFG:
            raise ValueError(f"{field} is not a field of timm's description of weights.")
        elif value is not None:
            _PRETRAINED_CFG[name](field, value)


def check_label_names(name: str, names: object, count: int | None = None) -> list[str]:
    """Return class names in the order of the logits.

    Args:
        name: Name of the field, for messages.
        names: A list of strings, or a mapping from class numbers to strings.
        count: Number of classes, if known.

    Raises:
        ValueError: A name is not a string, a class has no name, or there are not ``count`` names.
    """
    if isinstance(names, Mapping):
        try:
            numbered = sorted((int(number), label) for number, label in names.items())
        except (TypeError, ValueError):
            raise refuse(name, "a mapping from class numbers to names", names) from None
        if [number for number, _ in numbered] != list(range(len(numbered))):
            raise refuse(name, "a mapping that names each class from 0 on", names)
        names = [label for _, label in numbered]
    if isinstance(names, str | bytes) or not isinstance(names, list | tuple):
        raise refuse(name, "a list of class names", names)
    for label in names:
        check_text(f"{name}: a class name", label, 1000)
    if count is not None and len(names) != count:
        raise ValueError(f"{name} must have one name for each of the {count} classes, got {len(names)}.")
    return list(names)


def check_config(config: object, *, is_cifar: Callable[[str], bool]) -> dict[str, Any]:
    """Check and return the content of a ``config.json``, which may only describe structure.

    Args:
        config: Content, as returned by ``json.load``.
        is_cifar: Function that returns whether an architecture name is one of the CIFAR networks.

    Raises:
        ValueError: A field is missing, unknown, out of bounds, or chooses anything except structure.
    """
    if not isinstance(config, Mapping):
        raise refuse("config.json", "an object", config)
    if "architecture" not in config:
        raise ValueError(f"config.json has no field 'architecture', only {shortened(sorted(map(str, config)))}.")
    check_text("architecture", config["architecture"])
    for name in config:
        if not isinstance(name, str) or _NOT_AT_ROOT.fullmatch(name):
            # A null, or transformers' name of the default attention, has no effect.
            if config[name] in (None, "eager", "sdpa"):
                continue
            raise ValueError(f"{shortened(name)} is refused at the root of config.json: it is not structure.")
    config = {**config, "model_args": without_classes(config.get("model_args"), config.get("num_classes"))}
    checks: dict[str, Callable[[str, Any], object]] = {
        **dict.fromkeys(("num_classes", "num_labels"), lambda name, value: check_whole(name, value, 0, MAX_CLASSES)),
        "model_args": lambda name, value: check_model_args(value, is_cifar=is_cifar(config["architecture"])),
        "pretrained_cfg": lambda name, value: _check_pretrained_cfg(value),
        "label_names": lambda name, value: check_label_names(name, value, config.get("num_classes")),
        "id2label": check_label_names,
        "side_loss_weight": _check_side_loss_weight,
        "out_features": _check_layers_named,
        "out_indices": lambda name, value: check_wholes(name, value, -64, 64, range(65)),
        "weights_sha256": _check_digest,
        "base_model": check_text,
    }
    for name, check in checks.items():
        if config.get(name) is not None:
            check(name, config[name])
    if is_cifar(config["architecture"]) and (config.get("pretrained_cfg") or {}).get("fixed_input_size"):
        raise ValueError("pretrained_cfg['fixed_input_size'] must be false: CIFAR networks accept images of any size.")
    return config


def _check_side_loss_weight(name: str, value: object) -> None:
    if not is_number(value, 0.0, 1e6):
        raise refuse(name, "a finite number of at least 0", value)


def _check_digest(name: str, value: object) -> None:
    if not (isinstance(value, str) and _DIGEST.fullmatch(value)):
        raise refuse(name, "64 hexadecimal digits", value)
