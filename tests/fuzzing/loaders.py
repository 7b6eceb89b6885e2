"""All ways to read a saved directory. A loader takes the path and returns a :class:`Loaded`."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Loaded:
    """What a loader returned.

    Args:
        model: A network, or None from loaders of configurations.
        output: Which output of it is compared with other loaders: 'logits', 'pooled' or 'maps'.
        weights: Whether it must hold the numbers of the file.
        new_classifier: Whether the caller asked for a new classifier.
        part: Whether the file may hold more than the network: 'all', 'no classifier' or 'stages'.
        architecture: The network's name, from which the oracle knows the classifier's.
    """

    model: Any
    output: str = "logits"
    weights: bool = True
    new_classifier: bool = False
    part: str = "all"
    architecture: str | None = None


Loader = Callable[[str], Loaded]
PACKAGE = (
    "timm", "timm_untrained", "stage_names", "auto", "auto_new", "auto_resized", "model", "backbone", "from_config",
    "processor",
)  # fmt: skip
STANDALONE = (
    "standalone", "standalone_new", "standalone_resized", "standalone_model", "standalone_backbone",
    "standalone_stage_names",
)  # fmt: skip


def package_loaders() -> tuple[dict[str, Loader], list[Path]]:
    """The loaders of timm and transformers with this package imported, and where the code of the package lies."""
    import timm
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
    )

    import timm_eps

    def by_timm(directory: str) -> Loaded:
        model = timm.create_model(f"local-dir:{directory}", pretrained=True)
        return Loaded(model.eval(), architecture=(getattr(model, "pretrained_cfg", None) or {}).get("architecture"))

    def is_own(model: Any) -> bool:
        # A configuration that names a model of transformers itself gets that, whose loading is not this package's.
        return type(model).__module__.startswith("timm_eps.")

    def by_auto(directory: str, **kwargs: Any) -> Loaded:
        model = AutoModelForImageClassification.from_pretrained(directory, **kwargs)
        if not is_own(model):
            return Loaded(None)
        return Loaded(model, new_classifier=bool(kwargs), architecture=getattr(model.config, "architecture", None))

    def features(cls: Any, output: str) -> Loader:
        def load(directory: str) -> Loaded:
            model = cls.from_pretrained(directory)
            if not is_own(model):
                return Loaded(None)
            architecture = getattr(model.config, "architecture", None)
            return Loaded(model, output, part="no classifier", architecture=architecture)

        return load

    def stage_names(directory: str) -> Loaded:
        config = AutoConfig.from_pretrained(directory)
        if config.model_type == "eps_resnet":
            _ = config.stage_names, config.num_hidden_layers, config.out_features, config.out_indices
        return Loaded(None)

    def from_config(directory: str) -> Loaded:
        return Loaded(AutoBackbone.from_config(AutoConfig.from_pretrained(directory)), weights=False)

    def processor(directory: str) -> Loaded:
        AutoImageProcessor.from_pretrained(directory)
        return Loaded(None)

    loaders: dict[str, Loader] = {
        "timm": by_timm,
        "timm_untrained": lambda d: Loaded(timm.create_model(f"local-dir:{d}"), weights=False),
        "stage_names": stage_names,
        "auto": by_auto,
        "auto_new": lambda d: by_auto(d, ignore_mismatched_sizes=True, num_labels=7),
        "auto_resized": lambda d: by_auto(d, ignore_mismatched_sizes=True),
        "model": features(AutoModel, "pooled"),
        "backbone": features(timm_eps.EpsResNetBackbone, "maps"),
        "from_config": from_config,
        "processor": processor,
    }
    assert tuple(loaders) == PACKAGE
    return loaders, [Path(timm_eps.__file__).parent]


def standalone_loaders(saved: Path, workdir: Path) -> tuple[dict[str, Loader], list[Path]]:
    """The loaders of the code beside a saved model, in a process that has not imported this package.

    Args:
        saved: A directory written with ``remote_code=True``.
        workdir: Where the code is put, as a package of its own.
    """
    place = workdir / "remote_code" / "fuzz_standalone"
    if not place.exists():
        place.mkdir(parents=True)
        for path in saved.glob("*.py"):
            shutil.copy(path, place)
        (place / "__init__.py").write_text("")
    sys.path.insert(0, str(place.parent))
    code: Any = importlib.import_module("fuzz_standalone.modeling_eps_resnet")
    assert "timm_eps" not in sys.modules

    def load(cls: Any, output: str, part: str, **kwargs: Any) -> Loader:
        def loader(directory: str) -> Loaded:
            model = cls.from_pretrained(directory, **kwargs)
            return Loaded(model, output, new_classifier=bool(kwargs), part=part, architecture="eps_resnet20")

        return loader

    def stage_names(directory: str) -> Loaded:
        _ = code.EpsResNetConfig.from_pretrained(directory).stage_names
        return Loaded(None)

    classifier = code.EpsResNetForImageClassification
    loaders: dict[str, Loader] = {
        "standalone": load(classifier, "logits", "all"),
        "standalone_new": load(classifier, "logits", "all", ignore_mismatched_sizes=True, num_labels=7),
        "standalone_resized": load(classifier, "logits", "all", ignore_mismatched_sizes=True),
        "standalone_model": load(code.EpsResNetModel, "pooled", "no classifier"),
        "standalone_backbone": load(code.EpsResNetBackbone, "maps", "stages"),
        "standalone_stage_names": stage_names,
    }
    assert tuple(loaders) == STANDALONE
    return loaders, [place]
