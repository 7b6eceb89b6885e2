"""Save a trained model to disk and to the Hub, in one directory that timm and transformers can load.

transformers writes ``config.json`` and ``model.safetensors``, and huggingface_hub writes the card. All files are
written to a temporary directory first and moved into place when they are complete. A push to the Hub is one commit.
"""

from __future__ import annotations

import copy
import json
import logging
import os
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

from ..files.config_checks import check_label_names
from ..files.value_checks import shortened
from ..hf.model_files import staged
from ..hf.modeling_eps_resnet import EpsResNetForImageClassification, EpsResNetModel
from ..hf.pretrained_eps_resnet import EpsResNetPreTrainedModel
from ..report import draw_blocks
from ..surgery.branches import gates, input_size, timm_body
from ..surgery.removal import check_gated, closed_slots, natural_order, removed_slots
from ..surgery.sharding import gathered
from .card import render_card
from .commit import NOTHING, asking, commit_files
from .onnx_export import export_onnx
from .program_export import export_program
from .remote_code import CODE_FILES, add_remote_code, check_remote_code

__all__ = ["push_to_hub", "save_pretrained"]

_logger = logging.getLogger(__name__)
PICTURE = "blocks.png"
RESULTS = "all_results.json"
ONNX = "onnx/model.onnx"
ONNX_INT8 = "onnx/model_int8.onnx"  # the name that transformers.js looks for
PROGRAM = "model.pt2"
PAGE = "report.html"  # of write_page; it describes the model that an earlier save wrote
_OPTIONAL = (PICTURE, RESULTS, ONNX, ONNX_INT8, PROGRAM, PAGE, *CODE_FILES)


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
    exported_program: bool = False,
) -> None:
    """Save a model so that timm and transformers load it with equal logits.

    The files are ``model.safetensors``, ``config.json``, the card ``README.md``, the picture ``blocks.png`` (with
    matplotlib installed) and, with ``results``, ``all_results.json``. The model is saved in its evaluation form: closed
    branches and the side head are left out. The model itself is unchanged. Optional files left over from an earlier
    save are deleted, because they describe a different model.

    If the parameters of the model are sharded over processes (FSDP2), every process must call this. The first process
    gets the whole weights and writes the files.

    All files are written to a temporary directory first, so the previous save stays intact if this one fails or is
    killed. Then they are renamed one by one, configuration and weights last. The configuration contains the digest of
    the weights. If a process is killed between these two renames, loading reports that the files do not match.

    Args:
        model: A timm model of this package or one of its transformers classes.
        directory: Directory to write; it is created if needed.
        label_names: Names of the classes, as a list in the order of the logits or a mapping from class numbers. By
            default the model's own names.
        results: Values of ``all_results.json`` for the card. :data:`timm_eps.hub.card.RESULT_KEYS` are required.
        history: :attr:`EpsilonPruner.history`, for the picture.
        repo_id: Name of the model in the card; by default the directory's name.
        remote_code: Whether to add code and edits with which transformers loads the model without this package, with
            ``trust_remote_code=True``. A twin also needs timm there.
        onnx: Whether to add ``onnx/model.onnx``, which maps ``pixel_values`` to ``logits``.
        onnx_int8: Batches of training images, as :func:`timm_eps.export_onnx` takes them. If they are given,
            ``onnx/model_int8.onnx`` is added, calibrated on them.
        exported_program: Whether to add ``model.pt2``, which plain torch loads; see :func:`timm_eps.export_program`.

    Raises:
        ValueError: The model cannot be rebuilt from a name and arguments, its weights are not finite, the names do not
            fit the classes, ``results`` lacks a key or contains NaN, ``remote_code`` is set for a network that neither
            timm nor the code of the CIFAR networks builds, or torch cannot trace the network for
            ``exported_program``.
        ImportError: ``onnx`` or ``onnx_int8`` is set, but onnx, onnxscript or onnxruntime is not installed.
        OSError: The directory cannot be written.
    """
    check_gated(model)
    model = gathered(model, on_main=True)
    if model is None:  # another process writes the sharded model
        return
    if remote_code:
        check_remote_code(timm_body(model))
    wrapper = _as_transformers(model, label_names)
    body = timm_body(wrapper)
    gone = sorted([*removed_slots(body), *closed_slots(body)], key=natural_order)
    slots = sorted([*removed_slots(body), *gates(body)], key=natural_order)
    with staged(directory) as staging:
        wrapper.save_pretrained(staging)
        if remote_code:
            add_remote_code(staging, body)
        if onnx:
            export_onnx(body, staging / ONNX)
        if onnx_int8 is not None:
            export_onnx(body, staging / ONNX_INT8, quantize="static", calibration=onnx_int8)
        if exported_program:
            export_program(body, staging / PROGRAM)
        if find_spec("matplotlib") is not None:
            title = f"{wrapper.config.architecture}: {len(slots) - len(gone)} of {len(slots)} residual branches remain"
            draw_blocks(slots, gone, history, staging / PICTURE, title)
        else:
            _logger.warning("No %s in %s: matplotlib is not installed.", PICTURE, directory)
        card = render_card(
            wrapper.config.architecture,
            repo_id or Path(directory).resolve().name,
            blocks_total=len(slots),
            blocks_kept=len(slots) - len(gone),
            results=results,
            label_names=wrapper.config.to_dict()["label_names"] if body.num_classes else (),
            input_size=input_size(body),
            picture=PICTURE if (staging / PICTURE).exists() else None,
            remote_code=remote_code,
            onnx=ONNX if onnx else None,
            onnx_int8=ONNX_INT8 if onnx_int8 is not None else None,
            program=PROGRAM if exported_program else None,
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
) -> CommitInfo | None:
    """Push the files of :func:`save_pretrained`, including the card, to the Hub in one commit.

    The weights are uploaded before the commit, so a push that fails in between publishes nothing. The next push does
    not upload the same weights again.

    Args:
        model: A timm model of this package or one of its transformers classes.
        repo_id: Name on the Hub, ``owner/name``, or ``name`` for the user's own repository. It is created if needed.
        private: Whether a new repository is private; by default the owner's settings decide.
        token: Token of the Hub; by default the one stored by ``hf auth login``.
        revision: Git branch to push to; it is created from the main branch if needed.
        commit_message: Title of the commit.
        saving: Arguments of :func:`save_pretrained`: ``label_names``, ``results``, ``history``, ``remote_code``,
            ``onnx``, ``onnx_int8``, ``exported_program``.

    Raises:
        ValueError: See :func:`save_pretrained`.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused: the token is not valid or has no permission to write.
        ConnectionError: The Hub did not answer, or its answer cannot be read.
        RuntimeError: An upload failed.

    The messages of the last three errors say whether the model was published. If the answer to the commit was an error,
    the Hub is asked again.
    """
    model = gathered(model, on_main=True)
    if model is None:  # another process pushes the sharded model
        return None
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        # Save first, so that errors in the model occur before the repository is created. The card needs the full name.
        with asking(api, NOTHING):
            owner = "" if "/" in repo_id else f"{api.whoami()['name']}/"
        save_pretrained(model, name, repo_id=owner + repo_id, **saving)
        paths = {path.relative_to(name).as_posix(): path for path in Path(name).rglob("*") if path.is_file()}
        with asking(api, NOTHING):
            full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(full_name, branch=revision, exist_ok=True)
            stale = set(_OPTIONAL).intersection(api.list_repo_files(full_name, revision=revision)) - paths.keys()
        # Not upload_folder, which may use several commits.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo, path) for path_in_repo, path in sorted(paths.items())),
            *(CommitOperationDelete(path_in_repo) for path_in_repo in sorted(stale)),
        ]
        return commit_files(api, full_name, operations, message=commit_message, revision=revision)


def _as_transformers(
    model: nn.Module, label_names: Sequence[str] | Mapping[int, str] | None
) -> EpsResNetPreTrainedModel:
    body: Any = timm_body(model)
    labels: dict[str, Any] = {}
    if label_names is not None:
        names = check_label_names("label_names", label_names, body.num_classes)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"label_names must be different for each class, got {shortened(twice)} twice.")
        labels = {"id2label": dict(enumerate(names))}
    if not isinstance(model, EpsResNetPreTrainedModel):
        return (EpsResNetForImageClassification if body.num_classes else EpsResNetModel).from_timm(body, **labels)
    if labels:
        model = copy.copy(model)  # the caller's model keeps its names
        model.config = copy.deepcopy(model.config)
        model.config.id2label = labels["id2label"]
        model.config.label2id = {name: index for index, name in labels["id2label"].items()}
    return model
