"""Hostile values: for any field, for fields by their name, and for keywords that a structure does not need."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

from .draft import CLOSED_PORT, MARKER, Draft, Rng


def _deep(levels: int, opening: str) -> Any:
    tree: Any = 1
    for _ in range(levels):
        tree = [tree] if opening == "[" else {"a": tree}
    return tree


def generic_value(draft: Draft, rng: Rng) -> Any:
    """A value that fits few fields."""
    return rng.choice(_GENERIC)(draft, rng)


_GENERIC: list[Callable[[Draft, Rng], Any]] = [
    lambda d, r: r.choice([None, True, False]),
    lambda d, r: r.choice([0, -1, 1, 2, 3, 7, 64, 255, 2**31, 2**63, 10**12, 10**30, -(10**9)]),
    lambda d, r: r.choice([0.0, -0.0, 0.5, 1.5, -2.5, 1e308, 1e-320, math.nan, math.inf, -math.inf]),
    lambda d, r: r.choice(["", " ", "x", "0", "3", "true", "null", "None", "relu", "avg", "meta", "cuda", "float16"]),
    lambda d, r: r.choice(["²", "٣", "stages.²", "stages.٠.blocks.٠", "\x00", "\ud800", "a\nb\nc", "é\u202e"]),
    lambda d, r: r.choice(["a", "9", "stages.", "\n"]) * r.choice([300, 5000, 100_000]),
    lambda d, r: r.choice(["../../x", "/", "~", "C:\\x", str(d.canary / "other.safetensors"), str(d.canary / "new")]),
    lambda d, r: r.choice([f"{CLOSED_PORT}/x.py", f"{CLOSED_PORT}/x.safetensors", "hf-hub:me/x", "me/x", "file:///etc/hosts"]),
    lambda d, r: f"__import__('os').mkdir({str(d.canary / 'made')!r}) or '{MARKER}'",
    lambda d, r: r.choice([[], [[]], [None], [1], [1, 2], [3, 3, 3], ["x"], [True] * 3, [10**5] * 2, [0.5] * 3]),
    lambda d, r: r.choice([[0] * 1000, ["a"] * 100_000, [[1, 2], [3, 4]], [{}]]),
    lambda d, r: r.choice([{}, {"a": 1}, {"a": {}}, {"": ""}, {"0": "x", "1": "y"}, {"__class__": "x"}]),
    lambda d, r: _deep(r.choice([5, 60, 400]), r.choice("[{")),
]  # fmt: skip


def slots(draft: Draft, rng: Rng) -> Any:
    """Lists of slots, some sound, most of them not."""
    known = draft.base.slots
    arguments = draft.config.get("model_args") if isinstance(draft.config, dict) else None
    now = arguments.get("removed") if isinstance(arguments, dict) else None
    now = now if isinstance(now, list) else []
    one = rng.choice(known)
    return rng.choice(
        [
            [], None, [*now, one], now + now, [one, one], known, known[::-1], rng.sample(known, min(3, len(known))),
            [one.rpartition(".")[0]], [one + "x"], [one.replace(".0", ".٠")], ["stages.²"], [7], [[one]], {one: True},
            one, "stages." * 20_000, ["x" * 100_000], [one] * 10_000, ["9" * 5000], [""], [None], [one.upper()],
            ["head"], ["stem"], ["norm"], ["."], [f"timm_model.{one}"], now[1:], now[::-1], [one + "\n"], 3, True,
        ]
    )  # fmt: skip


def numbers(draft: Draft, rng: Rng) -> Any:
    """Lists of sizes."""
    return rng.choice(
        [
            [10**6, 1, 1], [3, 3], [3, 3, 3, 3], [0, 0, 0], [-1, 3, 3], [3.0, 3, 3], ["3", 3, 3], 3, "333", [True] * 3,
            [[3]] * 3, [3, None, 3], [], [1, 1, 1], [2, 3, 3], [16, 32, 65], [16], [10**9] * 3, [16, 16, 16], None,
            [10**5, 10**5], [8], [8, -8], [0, 0], [8.5, 8], [2**62] * 4, {"0": 3}, [1] * 10_000, [32, 16, 64],
        ]
    )  # fmt: skip


SPECIFIC: dict[str, Callable[[Draft, Rng], Any] | list[Any]] = {
    "architecture": [
        "eps_resnet32", "eps_resnet752", "eps_resnet110", "eps_resnet26", "resnet18", "eps_resnet18", "eps_resnet50",
        "eps_test_vit2", "eps_test_resnet", "eps_vit_gigantic_patch14_224", "eps_vit_giant_patch14_dinov2",
        "vit_gigantic_patch14_clip_224", "eps_resnet50.a1_in1k", "hf-hub:me/x", "local-dir:/", "timm/resnet18.a1_in1k",
        "eps_", "EPS_RESNET20", "eps_resnet20\n", "eps_resnet²0", "eps_vgg11", "eps_eps_resnet20", "__class__",
        "eps_test_convnext2", "eps_swin_tiny_patch4_window7_224", "eps_beit_large_patch16_224",
    ],
    "removed": slots,
    "closed": slots,
    "layers": numbers,
    "channels": numbers,
    "depths": numbers,
    "dims": numbers,
    "pixel_mean": numbers,
    "img_size": numbers,
    "input_size": numbers,
    "pool_size": numbers,
    "num_classes": [0, 3, 6, 10**12, -5, "5", 5.0, True, None, [5], 10**6],
    "in_chans": [1, 4, 10**9, 0, -3, "3", 3.0, None, [3]],
    "depth": [0, 1, 3, 10**6, -1, "2", 2.0, None],
    "embed_dim": [1, 0, 10**6, 63, "64", None],
    "num_heads": [0, 1, 3, 10**9, "2"],
    "global_pool": ["", "max", "catavgmax", "token", "map", "x", None, 3, ["avg"]],
    "label_names": [
        ["a"], list("aaaaa"), [1, 2, 3, 4, 5], [None] * 5, {"0": "a"}, "abcde", ["a" * 100_000] * 5, list("edcba"),
        ["x"] * 100_000, [["a"]] * 5, {str(i): i for i in range(5)},
    ],
    "id2label": [{"0": "a"}, {"x": "y"}, [], {str(i): "s" for i in range(5)}, {"-1": "a"}, {"1e99": "a"}, 3],
    "label2id": [{"a": 0}, {"a": "x"}, [], 3],
    "num_labels": [0, 3, 10**9, -1, "5", None],
    "model_type": ["timm_wrapper", "resnet", "vit", "bert", "x", "", None, 3, "eps_resnet ", "EPS_RESNET"],
    "architectures": [["ResNetForImageClassification"], "x", [], None, [3], ["TimmWrapperForImageClassification"] * 9],
    "classifier": [["head.fc", "stages"], ["head", "blocks"], "stages", "", ".", None, 3, [], "stages.0", [None], ".*"],
    "first_conv": ["", "stages", None, 3, ["stem.conv"], "head.fc", "x.y.z"],
    "dtype": ["float16", "bfloat16", "float64", "int8", "bool", "meta", "float8_e4m3fn", "x", "auto", 3, {}, None],
    "side_loss_weight": [0.1, 1.0, -1, "x", math.nan, math.inf, True, 10**30, [0.1], None],
    "transformers_version": ["0.0.1", "99.0", None, 3, "x"],
    "mean": [[0.5], [0.5] * 4, [math.nan] * 3, "imagenet", None, 3, ["a"] * 3],
    "std": [[0, 0, 0], [0.5], [math.inf] * 3, None, "x"],
    "interpolation": ["x", 3, None, "nearest-exact"],
    "out_features": [["stem"], ["stage9"], ["stage1", "stage1"], "stage1", [3], [], {"stage1": 1}, None],
    "out_indices": [[0], [99], [-1], [1, 1], 3, "1", [1.5], [10**9], [[0]], None],
}  # fmt: skip


def evil_cfg(draft: Draft, rng: Rng) -> dict[str, Any]:
    """A description of weights that names a source."""
    canary = str(draft.canary / "other.safetensors")
    return rng.choice(
        [
            {"url": f"{CLOSED_PORT}/sitecustomize.py", "source": ""},
            {"url": f"{CLOSED_PORT}/x.safetensors", "source": "url"},
            {"hf_hub_id": "me/x", "source": "hf-hub"},
            {"hf_hub_id": "me/x", "source": "hf-hub", "hf_hub_filename": "x.bin"},
            {"file": canary, "source": "file"},
            {"file": canary},
            {"state_dict": {"stem.conv.weight": [0]}, "source": "state_dict"},
            {"custom_load": True},
            {"custom_load": "hf", "hf_hub_id": "me/x"},
            {"num_classes": 3, "classifier": "stages"},
            {"label_offset": 1},
            {"architecture": "resnet18"},
        ]
    )


# Keywords that choose sources, files, devices, classes or the form of the output.
KEYWORDS: dict[str, Callable[[Draft, Rng], Any]] = {
    "pretrained": lambda d, r: r.choice([True, 1, "true", f"{CLOSED_PORT}/x.pth", str(d.canary / "other.safetensors")]),
    "pretrained_cfg": lambda d, r: r.choice([evil_cfg(d, r), "a1_in1k", "x", 3]),
    "pretrained_cfg_overlay": lambda d, r: r.choice([evil_cfg(d, r), "x", None, [1]]),
    "pretrained_strict": lambda d, r: False,
    "pretrained_custom_load": lambda d, r: True,
    "checkpoint_path": lambda d, r: r.choice([str(d.canary / "other.safetensors"), str(d.canary / "evil.pth"), "x", 3]),
    "cache_dir": lambda d, r: str(d.canary / "cache"),
    "features_only": lambda d, r: r.choice([True, False, "x"]),
    "feature_cfg": lambda d, r: r.choice([{"feature_cls": "fx"}, {"out_indices": [0]}, "x"]),
    "feature_cls": lambda d, r: r.choice(["fx", "hook", "dict", "getter", "x"]),
    "out_indices": lambda d, r: r.choice([[0], [9], 1]),
    "out_features": lambda d, r: r.choice([["stem"], ["stage9"]]),
    "num_classes": lambda d, r: r.choice([0, 3, 5, 10**9]),
    "num_labels": lambda d, r: r.choice([0, 3, 10**9]),
    "kwargs_filter": lambda d, r: r.choice([["removed"], "removed", None]),
    "pretrained_filter_fn": lambda d, r: "x",
    "device": lambda d, r: r.choice(["meta", "cuda", "cpu", "mps", 3]),
    "dtype": lambda d, r: r.choice(["float16", "float64", 3, None]),
    "torch_dtype": lambda d, r: r.choice(["float16", "int8", "x", 3]),
    "scriptable": lambda d, r: True,
    "exportable": lambda d, r: True,
    "no_jit": lambda d, r: True,
    "pruned": lambda d, r: True,
    "url": lambda d, r: f"{CLOSED_PORT}/x.pth",
    "file": lambda d, r: str(d.canary / "other.safetensors"),
    "hf_hub_id": lambda d, r: "me/x",
    "hf_hub_filename": lambda d, r: "../x.bin",
    "source": lambda d, r: r.choice(["hf-hub", "url", "file", ""]),
    "state_dict": lambda d, r: r.choice([{}, {"stem.conv.weight": [0]}]),
    "custom_load": lambda d, r: r.choice([True, "hf"]),
    "classifier": lambda d, r: r.choice([["head.fc", "stages"], "stages", "blocks"]),
    "first_conv": lambda d, r: "stages.0",
    "label_offset": lambda d, r: r.choice([1, 10**6, -1]),
    "auto_map": lambda d, r: r.choice(
        [
            {"AutoConfig": "evil.EvilConfig", "AutoModelForImageClassification": "evil.EvilModel"},
            {"AutoConfig": "me/x--evil.EvilConfig"},
            {"AutoModelForImageClassification": ["evil.A", "me/x--evil.B"]},
            {"AutoConfig": "../../evil.X"},
            {"AutoImageProcessor": "evil.P"},
            "evil",
        ]
    ),
    "_name_or_path": lambda d, r: r.choice(["me/x", str(d.canary)]),
    "name_or_path": lambda d, r: "me/x",
    "_commit_hash": lambda d, r: "0" * 40,
    "quantization_config": lambda d, r: r.choice(
        [
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {"quant_method": "torchao", "quant_type": "int8"},
            {"quant_method": "gptq", "bits": 4},
            {"quant_method": "quanto"},
            {"quant_method": "x"},
            "x",
        ]
    ),
    "tie_word_embeddings": lambda d, r: True,
    "tie_encoder_decoder": lambda d, r: True,
    "base_model_tp_plan": lambda d, r: {"stages": "colwise"},
    "base_model_pp_plan": lambda d, r: {"stages": [["x"], ["y"]]},
    "base_model_prefix": lambda d, r: "stages",
    "is_encoder_decoder": lambda d, r: True,
    "attn_implementation": lambda d, r: r.choice(["kernels-community/flash-attn", "flash_attention_2", "x"]),
    "_attn_implementation": lambda d, r: r.choice(["me/kernel", "flash_attention_3", "sdpa"]),
    "torchscript": lambda d, r: True,
    "return_dict": lambda d, r: False,
    "output_hidden_states": lambda d, r: True,
    "problem_type": lambda d, r: r.choice(["regression", "x"]),
    "use_pretrained_backbone": lambda d, r: True,
    "backbone": lambda d, r: "me/x",
    "use_timm_backbone": lambda d, r: True,
    "text_config": lambda d, r: {"model_type": "bert"},
    "image_processor_type": lambda d, r: r.choice(["ViTImageProcessor", "x", 3]),
    "norm_layer": lambda d, r: r.choice(["layernorm", "batchnorm2d", "groupnorm", "x", ["a"], {}]),
    "act_layer": lambda d, r: r.choice(["gelu", "relu", "x", [], f"__import__('os') or '{MARKER}'"]),
    "block_args": lambda d, r: {"a": 1},
    "drop_path_rate": lambda d, r: r.choice([0.1, -1, 2, "x", math.nan]),
    "drop_rate": lambda d, r: r.choice([0.5, 2, "x"]),
    "removed": slots,
    "closed": slots,
    "pixel_mean": numbers,
    "layers": numbers,
    "weights_digest": lambda d, r: "0" * 64,
    "__init__": lambda d, r: 1,
    "self": lambda d, r: 1,
    "variant": lambda d, r: "resnet18",
    "model_name": lambda d, r: "resnet18",
    "unknown_keyword": lambda d, r: 1,
}


# ---- bytes


def flip(content: bytes, rng: Rng, begin: int = 0, end: int | None = None) -> bytes:
    result = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if result:
            result[rng.randrange(min(begin, len(result) - 1), min(end or len(result), len(result)))] ^= (
                1 << rng.randrange(8)
            )
    return bytes(result)


def splice(content: bytes, rng: Rng) -> bytes:
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    piece = content[a : min(b, a + rng.choice([1, 8, 64, 4096]))]
    place = rng.randrange(len(content) + 1)
    return content[:place] + piece + content[place + rng.choice([0, len(piece)]) :]


class _Mkdir:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__("os").mkdir, (self.path,)


def evil_pickle(draft: Draft, zipped: bool) -> bytes:
    content = pickle.dumps({"stem.conv.weight": _Mkdir(str(draft.canary / "made"))}, protocol=2)
    if not zipped:
        return content
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return file.getvalue()


def evil_code(draft: Draft) -> bytes:
    made = str(draft.canary / "made")
    return f"# {MARKER}\nimport os\nos.mkdir({made!r})\nclass EvilConfig: pass\nEvilModel = P = EvilConfig\n".encode()
