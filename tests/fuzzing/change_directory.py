"""Mutations of the directory: files that are missing, linked or huge, and files beside them."""

from __future__ import annotations

import json
from typing import Any

from .draft import Draft, Rng
from .files import CONFIG, WEIGHTS, Folder, Link, Sparse
from .values import evil_code, evil_pickle


def change_file(draft: Draft, rng: Rng) -> str:
    """config.json or the weights are missing, empty, links, directories, or huge."""
    name = rng.choice([CONFIG, WEIGHTS, WEIGHTS])
    other = draft.others[rng.choice(sorted(draft.others))]
    kind = rng.choice(
        ["missing", "empty", "folder", "loop", "dangling", "linked", "canary", "null", "huge", "no permission", "case"]
    )
    entries = draft.directory.entries
    entry: Any = draft.config_bytes() if name == CONFIG else draft.weights or b""
    if kind == "no permission":
        draft.directory.modes[name] = 0
        return f"{name}: {kind}"
    if kind == "missing":
        entry = None
    elif kind == "empty":
        entry = b""
    elif kind == "folder":
        entry = Folder()
    elif kind == "loop":
        entry = Link(name)
    elif kind == "dangling":
        entry = Link(rng.choice(["nowhere", "/nowhere/x", "../x"]))
    elif kind == "linked":
        entry = Link(str(other.path / name))
    elif kind == "canary":
        entry = Link(str(draft.canary / ("other.safetensors" if name == WEIGHTS else "secret.json")))
    elif kind == "null":
        entry = Link("/dev/null")
    elif kind == "huge":
        entry = Sparse(
            rng.choice([8 * 2**30, 2**20]) if name == WEIGHTS else 64 * 2**20, entry if rng.random() < 0.7 else b""
        )
    elif kind == "case":
        entries[name.upper()], entry = entry, None
    _replace(draft, name, entry)
    return f"{name}: {kind}"


def _replace(draft: Draft, name: str, entry: Any) -> None:
    """Let a file be something else than a regular file that later mutations change."""
    entries = draft.directory.entries
    entries.pop(name, None)
    if entry is not None:
        entries[name] = entry
    if name == WEIGHTS:
        draft.weights = None
    else:
        draft.text, draft.config = b"", None


def add_file(draft: Draft, rng: Rng) -> str:
    """Files that some loader looks for, beside the model or instead of its weights."""
    entries = draft.directory.entries
    kind = rng.choice(
        ["pickle", "pickle instead", "index", "adapter", "code", "module", "processor", "rest", "sub", "odd names",
         "huge", "weights too"]
    )  # fmt: skip
    if kind.startswith("pickle"):
        name = rng.choice(
            [
                "pytorch_model.bin",
                "model.bin",
                "model.pth",
                "pytorch_model.pt",
                "model.pt",
                "open_clip_pytorch_model.bin",
                "training_args.bin",
            ]
        )
        entries[name] = evil_pickle(draft, rng.random() < 0.5)
        if kind == "pickle instead":
            _replace(draft, WEIGHTS, None)
        return f"{kind}: {name}"
    if kind == "index":
        shard = rng.choice(
            ["../x.safetensors", str(draft.canary / "other.safetensors"), "part.safetensors", "part.bin", 3, WEIGHTS]
        )
        tensors, _ = draft.tensors()
        entries["part.safetensors"] = draft.weights or b""
        entries["part.bin"] = evil_pickle(draft, True)
        index = {"metadata": {"total_size": rng.choice([1, 10**15])}, "weight_map": dict.fromkeys(tensors, shard)}
        entries[rng.choice(["model.safetensors.index.json", "pytorch_model.bin.index.json"])] = json.dumps(
            index
        ).encode()
        if rng.random() < 0.7:
            _replace(draft, WEIGHTS, None)
    elif kind == "adapter":
        adapter = {
            "peft_type": "LORA",
            "base_model_name_or_path": rng.choice(["me/x", str(draft.canary)]),
            "task_type": None,
        }
        entries["adapter_config.json"] = rng.choice([json.dumps(adapter).encode(), b"{", b"[]"])
        entries["adapter_model.safetensors"] = draft.weights or b""
    elif kind == "code":
        for name in ("modeling_eps_resnet.py", "evil.py", "configuration_eps_resnet.py"):
            entries[name] = evil_code(draft)
        if isinstance(draft.config, dict) and rng.random() < 0.5:
            draft.config["auto_map"] = {
                "AutoConfig": "evil.EvilConfig",
                "AutoModelForImageClassification": "evil.EvilModel",
            }
    elif kind == "module":
        for name in ("sitecustomize.py", "timm_eps.py", "torch.py", "__init__.py", "conftest.py", "json.py"):
            entries[name] = evil_code(draft)
    elif kind == "processor":
        processor = rng.choice(
            [
                {"image_processor_type": "x"},
                {"auto_map": {"AutoImageProcessor": "evil.P"}},
                [],
                {"image_processor_type": "ViTImageProcessor", "size": "x"},
            ]
        )
        entries[rng.choice(["preprocessor_config.json", "processor_config.json"])] = json.dumps(processor).encode()
        entries["evil.py"] = evil_code(draft)
    elif kind == "rest":
        for name in rng.sample(
            [
                "tf_model.h5",
                "flax_model.msgpack",
                "model.onnx",
                "generation_config.json",
                "tokenizer.json",
                ".git/config",
                "README.md",
            ],
            3,
        ):
            entries[name] = rng.choice([b"", b"\x00" * 100, b"{}", b"\xff" * 10])
    elif kind == "sub":
        for name in (
            f"sub/{CONFIG}",
            f"sub/{WEIGHTS}",
            ".saving-x/config.json",
            ".saving-x/model.safetensors",
            "checkpoint-6/config.json",
        ):
            entries[name] = b"{}"
    elif kind == "odd names":
        for name in ("a" * 200, "ä²", "-rf", "x\ny", "con", " ", "model.safetensors~"):
            entries[name] = b"x"
    elif kind == "huge":
        entries[rng.choice(["pytorch_model.bin", "optimizer.pt", "README.md"])] = Sparse(8 * 2**30)
    else:
        other = draft.others[rng.choice(sorted(draft.others))]
        entries[
            rng.choice(
                [
                    "model_1.safetensors",
                    "open_clip_model.safetensors",
                    "diffusion_pytorch_model.safetensors",
                    "timm_model.safetensors",
                ]
            )
        ] = other.directory.text(WEIGHTS) or b""
        if rng.random() < 0.5:
            _replace(draft, WEIGHTS, None)
    return f"beside it: {kind}"
