"""ε-ResNet for CIFAR-sized images, pruned or not, for transformers alone: a copy of ``standalone.py`` of timm-eps.

The repository also has copies of the modules that it imports.

"Learning Strict Identity Mappings in Deep Residual Networks", X. Yu, Z. Yu, S. Ramalingam, CVPR 2018,
https://arxiv.org/abs/1804.01661. The network is a pre-activation ResNet of depth 6n + 2. Training with the package
timm-eps found the residual blocks that the task does not need; ``model_args["removed"]`` in ``config.json`` lists them.
Only the shortcut of such a block remains. timm-eps and timm read the same files. Needs transformers 5.23.

    x (B, 3, 32, 32) -> stem: conv 3x3, BN, ReLU -> (B, 16, 32, 32)
      -> stage 1: (B, 16, 32, 32) -> stage 2: (B, 32, 16, 16) -> stage 3: (B, 64, 8, 8) -> BN, ReLU, pool, linear

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention as PooledOutput
from transformers.utils.generic import can_return_tuple

from .config_checks import check_config, check_model_args
from .strict_loading import StrictLoading

__all__ = ["EpsResNetBackbone", "EpsResNetConfig", "EpsResNetForImageClassification", "EpsResNetModel"]

# An explicit list, because other depths of the form 6n + 2, such as eps_resnet50, are ImageNet networks.
_BLOCKS = {f"eps_resnet{depth}": (depth - 2) // 6 for depth in (20, 32, 44, 56, 110, 200, 302, 500, 752)}
# timm's arguments. These have only one supported value, and the drop rates affect only training in timm.
_FIXED = {"act_layer": "relu", "global_pool": "avg", "norm_layer": "batchnorm2d", "closed": []}
_IGNORED = {"drop_path_rate", "drop_rate"}


@strict
class EpsResNetConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of the ε-ResNet classes, stored under timm's keys: ``num_classes`` and ``label_names``.

    Args:
        architecture: Name of the unpruned network in timm-eps, ``eps_resnet20`` to ``eps_resnet752``.
        model_args: Keyword arguments of timm: ``removed`` (slots of removed branches), ``layers`` (blocks of each
            stage), ``channels`` (width of each stage), ``in_chans`` (channels of the images), ``pixel_mean`` (height
            and width of the images, if the network subtracts the mean of each pixel).
        pretrained_cfg: timm's description of the input, which the image processor reads.

    Raises:
        ValueError: ``architecture`` or one of ``model_args`` is unknown.
    """

    model_type = "eps_resnet"

    architecture: str = "eps_resnet110"
    model_args: dict[str, Any] | None = None
    pretrained_cfg: dict[str, Any] | None = None
    weights_sha256: str | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(check_config(config_dict, is_cifar=lambda _: True), **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        self.model_args = check_model_args(self.model_args, is_cifar=True)
        names, num_classes = kwargs.pop("label_names", None), kwargs.pop("num_classes", None)
        if num_classes is not None:
            kwargs.setdefault("num_labels", num_classes)
        if self.id2label is None and names is not None and len(names) == kwargs.get("num_labels", len(names)):
            self.id2label = dict(enumerate(names))
            self.label2id = {name: number for number, name in enumerate(names)}
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    @property
    def network(self) -> dict[str, Any]:
        """Arguments of the network: ``layers``, ``channels``, ``in_chans``, ``removed`` and ``pixel_mean``."""
        if self.architecture not in _BLOCKS:
            raise ValueError(f"architecture must be one of {', '.join(_BLOCKS)}, got {self.architecture!r}.")
        layers = (_BLOCKS[self.architecture],) * 3
        network: dict[str, Any] = {"layers": layers, "channels": (16, 32, 64), "in_chans": 3}
        network |= {"removed": (), "pixel_mean": None}
        for name, value in (self.model_args or {}).items():
            if value is None or name in _IGNORED or (name in _FIXED and value == _FIXED[name]):
                continue
            if name not in network:
                raise ValueError(f"model_args has {name}={value!r}, which this file cannot build; timm_eps can.")
            network[name] = value
        return network

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps: ``stem``, ``stage1``, ``stage2``, ``stage3``."""
        return ["stem", *(f"stage{number}" for number, _ in enumerate(self.network["layers"], start=1))]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        labels = {int(number): name for number, name in output.pop("id2label").items()}
        output.pop("label2id")
        output.pop("weights_sha256", None)  # it belongs to the loaded file
        return {**output, "num_classes": len(labels), "label_names": [labels[number] for number in sorted(labels)]}


class NormAct(nn.BatchNorm2d):
    """Batch normalisation, then ReLU: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(super().forward(x), inplace=True)


class PoolPadShortcut(nn.Module):
    """Shortcut where a stage halves the resolution: 2x2 average pooling, zero channels on both sides.

    (B, C, H, W) -> (B, C', H / 2, W / 2), with the C channels in the middle of the C'. Odd sizes round up.
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        before = (out_chs - in_chs) // 2
        self.padding = (0, 0, 0, 0, before, out_chs - in_chs - before)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.pool(x), self.padding)


class PixelMean(nn.Module):
    """Subtracts an individual mean from each pixel: (B, C, H, W) -> (B, C, H, W), for a fixed height and width.

    This is the paper's input on CIFAR. Image processors subtract only the mean of the channels, so this is a part of
    the network. ``mean`` (C, H, W) is the remaining mean, in units of the normalised images.
    """

    mean: Tensor

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, height, width))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


class PreActBasic(nn.Module):
    """Block shortcut(x) + conv(BN-ReLU(conv(BN-ReLU(x)))): (B, C, H, W) -> (B, C', H / stride, W / stride).

    Without ``preact`` the first BN-ReLU is left out.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, preact: bool, shortcut: nn.Module) -> None:
        super().__init__()
        self.downsample = shortcut
        self.norm1 = NormAct(in_chs) if preact else nn.Identity()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = NormAct(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(self.norm1(x))
        residual = self.conv2(self.norm2(residual))
        return residual + self.downsample(x)


class EpsResNetPreTrainedModel(StrictLoading, PreTrainedModel):
    """Base of the ε-ResNet classes: the stem and the stages, with timm's names, and their initialisation."""

    config_class = EpsResNetConfig
    config: EpsResNetConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["PreActBasic"]  # noqa: RUF012  transformers declares it like this

    is_cifar = True

    @classmethod
    def network_of(cls, config: EpsResNetConfig, num_classes: int) -> nn.Module:
        return (EpsResNetForImageClassification if num_classes else EpsResNetModel)(config)

    @classmethod
    def classifier_names(cls, config: EpsResNetConfig) -> set[str]:
        return {"head.fc.weight", "head.fc.bias"}

    def __init__(self, config: EpsResNetConfig) -> None:
        super().__init__(config)
        network = config.network
        removed = set(network["removed"])
        in_chs = network["channels"][0]
        conv = nn.Conv2d(network["in_chans"], in_chs, 3, padding=1, bias=False)
        stem: dict[str, nn.Module] = {"conv": conv, "norm": NormAct(in_chs)}
        if network["pixel_mean"]:
            stem = {"pixel_mean": PixelMean(network["in_chans"], *network["pixel_mean"]), **stem}
        self.stem = nn.Sequential(OrderedDict(stem))
        self.stages = nn.Sequential()
        for i, (depth, width) in enumerate(zip(network["layers"], network["channels"], strict=True)):
            blocks = nn.Sequential()
            for k in range(depth):
                stride = 2 if i > 0 and k == 0 else 1
                shortcut = nn.Identity() if stride == 1 and in_chs == width else PoolPadShortcut(in_chs, width)
                # The stem already applies BN-ReLU to the input of the first block.
                block = PreActBasic(in_chs, width, stride, preact=(i, k) != (0, 0), shortcut=shortcut)
                slot = f"stages.{i}.blocks.{k}.drop_path"
                blocks.append(shortcut if slot in removed else block)
                removed.discard(slot)
                in_chs = width
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
        if removed:
            raise ValueError(f"model_args removes {min(removed)!r}, which {config.architecture} does not have.")
        self.num_channels = in_chs

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)

    def _hidden_states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Images (B, C, H, W) to the outputs of the stem and each stage."""
        hidden_states = [self.stem(pixel_values.to(self.device, self.dtype))]
        for stage in self.stages:
            hidden_states.append(stage(hidden_states[-1]))
        return tuple(hidden_states)

    def _wants_hidden_states(self, output_hidden_states: bool | None) -> bool:
        return bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)


class EpsResNetModel(EpsResNetPreTrainedModel):
    """ε-ResNet without a classifier."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012  transformers declares it like this

    def __init__(self, config: EpsResNetConfig) -> None:
        super().__init__(config)
        self.norm = NormAct(self.num_channels)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None) -> PooledOutput:
        """Images (B, C, H, W) to ``last_hidden_state`` (B, 64, H / 4, W / 4) and ``pooler_output`` (B, 64)."""
        hidden_states = self._hidden_states(pixel_values)
        features = self.norm(hidden_states[-1])
        return PooledOutput(
            last_hidden_state=features,
            pooler_output=self.pool(features),
            hidden_states=hidden_states if self._wants_hidden_states(output_hidden_states) else None,
        )


class EpsResNetForImageClassification(EpsResNetPreTrainedModel):
    """ε-ResNet with a linear classifier; ValueError if the configuration has no classes."""

    def __init__(self, config: EpsResNetConfig) -> None:
        super().__init__(config)
        if not config.num_labels:
            raise ValueError("The stored network has no classifier; pass num_labels, or use AutoModel.")
        self.norm = NormAct(self.num_channels)
        classifier = nn.Linear(self.num_channels, config.num_labels)
        self.head = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=classifier))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """Images (B, C, H, W) and labels (B,) to the loss and ``logits`` (B, classes)."""
        hidden_states = self._hidden_states(pixel_values)
        logits = self.head(self.norm(hidden_states[-1]))
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=hidden_states if self._wants_hidden_states(output_hidden_states) else None,
        )


class EpsResNetBackbone(BackboneMixin, EpsResNetPreTrainedModel):
    """ε-ResNet for detectors and segmenters: feature maps of the stem and the stages named in ``out_features``."""

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"^norm\.", r"^head\."]  # noqa: RUF012  transformers declares it like this

    def __init__(self, config: EpsResNetConfig) -> None:
        super().__init__(config)
        self.num_features = [config.network["channels"][0], *config.network["channels"]]
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None) -> BackboneOutput:
        """Images (B, C, H, W) to ``feature_maps``, each (B, C', H / reduction, W / reduction)."""
        hidden_states = self._hidden_states(pixel_values)
        maps = dict(zip(self.stage_names, hidden_states, strict=True))
        return BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=hidden_states if self._wants_hidden_states(output_hidden_states) else None,
        )
