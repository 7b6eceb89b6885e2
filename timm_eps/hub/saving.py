"""A trained model on disk and on the Hub: one directory for timm, transformers and people.

``config.json`` and ``model.safetensors`` are written by transformers' own machinery, the card by huggingface_hub's.
Everything is written beside its destination first and moved into place when it is whole; what goes to the Hub goes
there in one commit.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from torch import nn

from ..files import config_checks, standalone, value_checks, weight_checks
from ..files.config_checks import check_label_names
from ..files.value_checks import shortened
from ..hf.configuration_eps_resnet import EpsResNetConfig
from ..hf.model_files import staged
from ..hf.modeling_eps_resnet import EpsResNetForImageClassification, EpsResNetModel
from ..hf.pretrained_eps_resnet import EpsResNetPreTrainedModel
from ..models.eps_resnet import EpsResNet
from ..report import draw_blocks
from ..surgery.branches import gates, timm_body
from ..surgery.removal import check_gated, closed_slots, natural_order, removed_slots
from .card import render_card
from .commit import NOTHING, asking, commit_files
from .onnx_export import export_onnx

__all__ = ["push_to_hub", "save_pretrained"]

_logger = logging.getLogger(__name__)
PICTURE = "blocks.png"
RESULTS = "all_results.json"
ONNX = "onnx/model.onnx"
ONNX_INT8 = "onnx/model_int8.onnx"  # as transformers.js looks for it
# standalone.py under the name that it has beside a config.json, and the classes in it.
REMOTE_CODE = "modeling_eps_resnet.py"
# It imports these, which stand beside it under their own names.
_CHECKS = (config_checks, value_checks, weight_checks)
_OPTIONAL = (PICTURE, RESULTS, ONNX, ONNX_INT8, REMOTE_CODE, *(Path(str(module.__file__)).name for module in _CHECKS))
_AUTO_MAP = {
    "AutoBackbone": "EpsResNetBackbone",
    "AutoConfig": "EpsResNetConfig",
    "AutoModel": "EpsResNetModel",
    "AutoModelForImageClassification": "EpsResNetForImageClassification",
}


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    label_names: Sequence[str] | Mapping[int, str] | None = None,
    results: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    repo_id: str | None = None,
    remote_code: bool = False,
    onnx: bool = False,
    onnx_int8: Iterable[Any] | None = None,
) -> None:
    """Save a model so that timm and transformers load it with equal logits.

    Written are ``model.safetensors``, ``config.json``, the card ``README.md``, the picture ``blocks.png`` (with
    matplotlib installed) and, with ``results``, ``all_results.json``. What is saved is what the model evaluates to:
    closed branches and the side head are left out. The model itself is unchanged. Of these files and the optional
    ones, those that an earlier save left and this one does not write are deleted: they would speak of another model.

    All files are written to the side first, so a save that fails or is killed leaves the previous one whole. Then they
    are renamed one by one, configuration and weights last. The configuration holds the digest of the weights: if a
    process is killed between these two renames, loading says that they do not fit.

    Args:
        model: A timm model of this package or one of its transformers classes.
        directory: Made if it is not there.
        label_names: Names of the classes, in the order of the logits; of a mapping, its values by class number. By
            default the names that the model knows.
        results: Values of ``all_results.json``; they fill the card. :data:`timm_eps.hub.card.RESULT_KEYS` are needed.
        history: :attr:`EpsilonPruner.history`, for the picture.
        repo_id: How the card names the model; by default the directory's name.
        remote_code: Add the code of the CIFAR networks, so that transformers loads the model without this package,
            with ``trust_remote_code=True``.
        onnx: Add ``onnx/model.onnx``, ``pixel_values`` to ``logits``.
        onnx_int8: Add ``onnx/model_int8.onnx``, calibrated on these batches of training images, as
            :func:`timm_eps.export_onnx` takes them.

    Raises:
        ValueError: The model cannot be built again from a name and arguments, its weights are not finite, the names do
            not fit the classes, ``results`` lacks a key or holds NaN, or ``remote_code`` is asked for a network that is
            not one of the CIFAR networks.
        ImportError: ``onnx`` or ``onnx_int8`` without onnx and onnxscript, or ``onnx_int8`` without onnxruntime.
        OSError: The directory cannot be written.
    """
    check_gated(model)
    if remote_code:
        _check_remote_code(timm_body(model))
    wrapper = _as_transformers(model, label_names)
    body = timm_body(wrapper)
    gone = sorted([*removed_slots(body), *closed_slots(body)], key=natural_order)
    slots = sorted([*removed_slots(body), *gates(body)], key=natural_order)
    with staged(directory) as staging:
        wrapper.save_pretrained(staging)
        if remote_code:
            _add_remote_code(staging)
        if onnx:
            export_onnx(body, staging / ONNX)
        if onnx_int8 is not None:
            export_onnx(body, staging / ONNX_INT8, quantize="static", calibration=onnx_int8)
        if find_spec("matplotlib") is not None:
            title = f"{wrapper.config.architecture}: {len(slots) - len(gone)} of {len(slots)} residual branches stayed"
            draw_blocks(slots, gone, history, staging / PICTURE, title)
        else:
            _logger.warning("No %s in %s: matplotlib is not installed.", PICTURE, directory)
        card = render_card(
            wrapper.config.architecture,
            repo_id or Path(directory).resolve().name,
            blocks_total=len(slots),
            blocks_kept=len(slots) - len(gone),
            results=results,
            classifies=bool(body.num_classes),
            picture=PICTURE if (staging / PICTURE).exists() else None,
            remote_code=remote_code,
            onnx=ONNX if onnx else None,
            onnx_int8=ONNX_INT8 if onnx_int8 is not None else None,
            base_model=wrapper.config.base_model,
        )
        card.save(staging / "README.md")
        if results is not None:
            (staging / RESULTS).write_text(json.dumps(results, indent=2, sort_keys=True, allow_nan=False) + "\n")
        stale = [name for name in _OPTIONAL if not (staging / name).exists()]
    for name in stale:
        (Path(directory) / name).unlink(missing_ok=True)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    **saving: Any,
) -> CommitInfo:
    """Push a model to the Hub, in one commit: what :func:`save_pretrained` writes, the card included.

    The weights go up first and the commit last, so a push that fails in between publishes nothing, and the next one
    does not send again what has arrived.

    Args:
        model: A timm model of this package or one of its transformers classes.
        repo_id: Name on the Hub, ``owner/name``, or ``name`` for one of the user's own. Made if it is not there.
        private: Whether a repository that is made here is private; by default as the owner's settings have it.
        token: Of the Hub; by default the one that ``hf auth login`` stored.
        revision: The branch to push to; made if it is not there, from the main branch.
        commit_message: Title of the commit.
        saving: ``label_names``, ``results``, ``history``, ``remote_code``, ``onnx`` and ``onnx_int8``, as for
            :func:`save_pretrained`.

    Raises:
        ValueError: See :func:`save_pretrained`.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused: the token is not valid or may not write there.
        ConnectionError: The Hub did not answer, or not in a way that can be read.
        RuntimeError: An upload failed.

    The text of the last three says whether the model was published; if the answer to the commit was an error, the Hub
    has been asked again.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        # What is wrong with the model shows before anything is made on the Hub; the card needs the name in full.
        with asking(api, NOTHING):
            owner = "" if "/" in repo_id else f"{api.whoami()['name']}/"
        save_pretrained(model, name, repo_id=owner + repo_id, **saving)
        paths = {path.relative_to(name).as_posix(): path for path in Path(name).rglob("*") if path.is_file()}
        with asking(api, NOTHING):
            full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(full_name, branch=revision, exist_ok=True)
            stale = set(_OPTIONAL).intersection(api.list_repo_files(full_name, revision=revision)) - paths.keys()
        # Not upload_folder: it may send a folder in several commits.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo, path) for path_in_repo, path in sorted(paths.items())),
            *(CommitOperationDelete(path_in_repo) for path_in_repo in sorted(stale)),
        ]
        return commit_files(api, full_name, operations, message=commit_message, revision=revision)


def _check_remote_code(body: nn.Module) -> None:
    if not isinstance(body, EpsResNet):
        raise ValueError(
            f"remote_code is for the CIFAR networks; {type(body).__name__} is timm's own class. "
            "timm_eps.export_timm writes such a network for machines without this package."
        )
    known = EpsResNetConfig.from_timm(body)
    model_args = {name: value for name, value in (known.model_args or {}).items() if name != "closed"}  # not written
    # Raises if it cannot build the network.
    _ = standalone.EpsResNetConfig(architecture=known.architecture, model_args=model_args).network


def _add_remote_code(directory: Path) -> None:
    """Put the CIFAR networks' code beside a config.json, and say there that it is to be used."""
    shutil.copyfile(standalone.__file__, directory / REMOTE_CODE)
    for module in _CHECKS:
        shutil.copy(str(module.__file__), directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {name: f"{REMOTE_CODE.removesuffix('.py')}.{entry}" for name, entry in _AUTO_MAP.items()}
    # Found by the model's type where this package is installed, by this name where it is not.
    config["image_processor_type"] = "TimmWrapperImageProcessor"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_transformers(
    model: nn.Module, label_names: Sequence[str] | Mapping[int, str] | None
) -> EpsResNetPreTrainedModel:
    body: Any = timm_body(model)
    labels: dict[str, Any] = {}
    if label_names is not None:
        names = check_label_names("label_names", label_names, body.num_classes)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"label_names must name each class differently, got {shortened(twice)} twice.")
        labels = {"id2label": dict(enumerate(names))}
    if not isinstance(model, EpsResNetPreTrainedModel):
        return (EpsResNetForImageClassification if body.num_classes else EpsResNetModel).from_timm(body, **labels)
    if labels:
        model = copy.copy(model)  # the caller's keeps its names
        model.config = copy.deepcopy(model.config)
        model.config.id2label = labels["id2label"]
        model.config.label2id = {name: index for index, name in labels["id2label"].items()}
    return model
