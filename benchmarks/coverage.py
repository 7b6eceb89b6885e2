#!/usr/bin/env python
"""Test for each timm architecture which residual branches can be removed exactly: writes docs/coverage.md.

    python -m benchmarks.coverage                # everything; takes about two hours on two cores and resumes
    python -m benchmarks.coverage --only resnet  # modules whose name contains this; prints, writes nothing

First every architecture of timm is built and traced without memory, to find its gates. Then the smallest one of each
network class and set of residual blocks is tested. Gates are added, a random half of them is closed and removed, with
three seeds, and outputs are compared bit by bit. The pruned network is rebuilt by its twin's name. A network without
half of its blocks, but with each stage's first, is exported as a stock timm architecture. Then follow TorchScript and
torch.fx (``benchmarks/tools.py``), and the forms that need no timm_eps (``benchmarks/shipping.py``). Results stay in
coverage.json with the versions until they are deleted there.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import statistics
import tempfile
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import timm_eps
from benchmarks.shipping import FORMS, Elsewhere, try_shipping
from benchmarks.tools import STATES, TOOLS, try_tools
from timm_eps.names import twin_name
from timm_eps.report import count_parameters
from timm_eps.surgery.branches import branch_parameters, evaluating, find_slots, gates, probe_batch, slots_by_block
from timm_eps.surgery.removal import closed_slots, removed_slots, same_outputs

ROOT = Path(__file__).parent.parent
STORE = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
# The smallest of these is too large to compute. Shorter or narrower networks, or smaller images, have the same blocks.
SHORTENED: dict[str, dict[str, Any]] = {
    "deepseek_vit_412m": {"depth": 4, "embed_dim": 128, "num_heads": 4, "img_size": 112},
    "deepseek_vit_412m_enc": {"depth": 4, "img_size": 112, "out_features": 256},
    "eva02_enormous_patch14_clip_224": {"depth": 4, "embed_dim": 128, "num_heads": 4, "img_size": 112},
    "gemma4_vit_167m": {"depth": 4, "img_size": 144},
    "gemma4_vit_167m_enc": {"depth": 4, "img_size": 144},
    "mobilenetv5_300m_enc": {"pretrained_cfg_overlay": {"input_size": (3, 256, 256)}},
    "qwen3_vit_88m": {"depth": 4, "img_size": 128},
    "qwen3_vit_88m_enc": {"depth": 4, "img_size": 128},
}


def scan(name: str) -> dict[str, Any]:
    """Facts about an architecture that need no computation: its class, residual blocks, gates and rejected slots."""
    with torch.device("meta"):
        model = timm.create_model(name)
    accepted, refused = find_slots(model)
    return {
        "module": timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
        "class": type(model).__name__,
        "blocks": sorted({type(model.get_submodule(path)).__name__ for path in slots_by_block(model, accepted)}),
        "gates": len(accepted),
        "refused": dict(Counter(refused.values())),
        "parameters": count_parameters(model),
    }


def try_out(name: str) -> dict[str, Any]:
    """Gate, prune, rebuild and export one architecture."""
    arguments = SHORTENED.get(name, {})
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for parameter in model.parameters():
        if parameter.ndim <= 1:  # otherwise branches with a zero scale would always be zero
            nn.init.uniform_(parameter, 0.5, 1.5)
    batch = probe_batch(model)
    with evaluating(model):
        plain = model(batch)
        keys = list(model.state_dict())
        timm_eps.add_gates(model)
        found: dict[str, Any] = {"open_equal": same_outputs(plain, model(batch)) and keys == list(model.state_dict())}
    slots = list(gates(model))
    found |= {"shut": [], "removed": [], "exact": [], "freed": [], "dead": [], "rebuilt": []}
    for seed in SEEDS:
        pruned = copy.deepcopy(model)
        for slot in random.Random(seed).sample(slots, (len(slots) + 1) // 2):
            gates(pruned)[slot].closed = True
        shut = closed_slots(pruned)
        before_count = count_parameters(pruned)
        dead = sum(parameter.numel() for parameter in branch_parameters(pruned, shut).values())
        with evaluating(pruned):
            before = pruned(batch)
            timm_eps.remove_closed(pruned)
            found["exact"].append(same_outputs(before, pruned(batch)))
        found["shut"].append(len(shut))
        found["removed"].append(len(set(removed_slots(pruned)) & set(shut)))
        found["dead"].append(dead / before_count)
        found["freed"].append(1 - count_parameters(pruned) / before_count)
        twin = timm.create_model(twin_name(name), removed=removed_slots(pruned), **arguments).eval()
        twin.load_state_dict(pruned.state_dict())
        with evaluating(twin):
            found["rebuilt"].append(same_outputs(before, twin(batch)))
    return found | try_export(model, name)


def try_export(model: nn.Module, name: str) -> dict[str, Any]:
    """Export with half of the blocks removed, but no stage's first block; if that fails, with zeros for branches."""
    blocks = slots_by_block(model, gates(model))
    later = [path for path in blocks if path.rpartition(".")[2] != "0"] or list(blocks)
    for path in random.Random(0).sample(later, (len(later) + 1) // 2):
        for slot in blocks[path]:
            gates(model)[slot].closed = True
    batch = probe_batch(model)
    with evaluating(model):
        expected = model(batch)
    answer: dict[str, Any] = {}
    for how, zero_branches in (("export", False), ("export_with_zeros", True)):
        with tempfile.TemporaryDirectory() as directory:
            try:
                timm_eps.export_timm(model, directory, zero_branches=zero_branches)
            except ValueError as error:
                answer[how] = str(error)
                continue
            try:
                stock = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
            except (RuntimeError, TypeError, ValueError) as error:
                answer[how] = f"timm cannot build this architecture from a directory: {error}"
                continue
        with evaluating(stock):
            assert same_outputs(expected, stock(batch)), f"{name} exported something else"
        answer[how] = None
        break
    return answer


def representatives(scanned: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The smallest gated architecture of each class and set of blocks, and all architectures that it represents."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, seen in scanned.items():
        if seen["gates"]:
            groups[(seen["class"], *seen["blocks"])].append(name)
    return {min(names, key=lambda name: scanned[name]["parameters"]): names for names in groups.values()}


def tools_table(tools: dict[str, dict[str, Any]], rows: list[str]) -> list[str]:
    """The lines on TorchScript and torch.fx."""
    by_versions = Counter(tools[name]["versions"] for name in rows if name in tools)
    sizes = ", ".join(f"{number} kinds with {versions}" for versions, number in sorted(by_versions.items()))
    lines = [
        "## TorchScript and torch.fx",
        "",
        f"Tested on {sizes}, without gradients, in evaluation mode unless a row says training. The first column "
        "counts the kinds for which a tool accepts timm's own network. The other columns count those of them for "
        "which the tool also accepts the gated or pruned network and computes the same output. The last branch of "
        "every second block is closed or removed. For whole blocks, all branches of these blocks are removed.",
        "",
        f"| | timm's | {' | '.join(STATES)} |",
        f"|---|{'---:|' * (len(STATES) + 1)}",
    ]
    obstacles: dict[str, list[str]] = defaultdict(list)
    for label in TOOLS:
        taken = {name: found for name in rows if (found := tools.get(name, {}).get("obstacles", {}).get(label))}
        counts = [sum(found[state] is None for found in taken.values()) for state in STATES]
        lines.append(f"| {label} | {len(taken)} | {' | '.join(map(str, counts))} |")
        for name, found in taken.items():
            for state in STATES:
                if found[state] is not None:
                    obstacles[f"{label}, {state}: {found[state]}"].append(name)
    lines += [""] * bool(obstacles)
    return lines + [f"- {why}: {', '.join(f'`{name}`' for name in names)}" for why, names in sorted(obstacles.items())]


def shipping_obstacles(shipped: dict[str, dict[str, Any]], rows: list[str]) -> list[str]:
    """The lines on the kinds that do not load without this package."""
    obstacles: dict[str, list[str]] = defaultdict(list)
    for name in rows:
        for form, found in shipped.get(name, {}).get("obstacles", {}).items():
            for why in dict.fromkeys(reason for reason in found.values() if reason):
                obstacles[f"{form}: {why}"].append(name)
    if not obstacles:
        return []
    listed = [f"- {why}: {', '.join(f'`{name}`' for name in names)}" for why, names in sorted(obstacles.items())]
    return ["## Why some do not load without timm_eps", "", *listed]


def versions() -> str:
    """The versions that affect the figures."""
    return f"timm {timm.__version__} and torch {torch.__version__.partition('+')[0]}"


def document(
    scanned: dict[str, dict[str, Any]],
    tried: dict[str, dict[str, Any]],
    tools: dict[str, dict[str, Any]],
    shipped: dict[str, dict[str, Any]],
) -> str:
    """docs/coverage.md."""
    standing = representatives(scanned)
    rows = sorted(standing, key=lambda name: (scanned[name]["module"], scanned[name]["class"], name))
    gated = [name for name, seen in scanned.items() if seen["gates"]]

    def share(condition: Any) -> str:
        good = sum(bool(condition(tried[name])) for name in rows)
        return f"{good} of {len(rows)} ({100 * good / len(rows):.1f} %)"

    def is_shipped(name: str, form: str) -> bool:
        found = shipped.get(name, {}).get("obstacles", {}).get(form)
        return found is not None and not any(found.values())

    def loads(form: str) -> str:
        good = sum(is_shipped(name, form) for name in rows)
        return f"{good} of {len(rows)} ({100 * good / len(rows):.1f} %)"

    def all_freed(found: dict[str, Any]) -> bool:
        return all(abs(a - b) < 1e-9 for a, b in zip(found["freed"], found["dead"], strict=True))

    lines = [
        "# Coverage of timm",
        "",
        f"Written by `python -m benchmarks.coverage` with timm {timm.__version__} and torch {torch.__version__}, on a "
        f"CPU. timm has {len(scanned)} architectures. In {len(gated)} of them, gates can close residual branches. The "
        f"network class and the types of residual block divide these into {len(rows)} kinds. The smallest "
        f"architecture of each kind was tested with random weights and seeds {', '.join(map(str, SEEDS))}. It "
        f"represents the others. {len(SHORTENED)} of these are too large for the test. They were tested with fewer "
        f"blocks, narrower layers or smaller images.",
        "",
        "| test | kinds that pass |",
        "|---|---:|",
        f"| open gates: same output bit for bit, same keys | {share(lambda f: f['open_equal'])} |",
        f"| a random half removed: same output bit for bit, every seed | {share(lambda f: all(f['exact']))} |",
        f"| every closed branch could be removed | {share(lambda f: f['shut'] == f['removed'])} |",
        f"| all parameters that served only these branches are deleted | {share(all_freed)} |",
        f"| rebuilt by the twin's name, weights loaded strictly: same output | {share(lambda f: all(f['rebuilt']))} |",
        f"| whole blocks removed: exported as a stock timm architecture | {share(lambda f: f['export'] is None)} |",
        f"| exported, if necessary with zeros for branches | "
        f"{share(lambda f: f['export'] is None or f.get('export_with_zeros', '') is None)} |",
        *(f"| whole and half blocks removed, without timm_eps: {form} | {loads(form)} |" for form in FORMS),
        "",
        "The columns describe the smallest architecture. *Gates*: number of gates; after the comma, slots without a "
        "gate. *Removed*: removed branches of the closed ones, over all seeds. *Freed*: share of all parameters that "
        "is deleted with a random half of the branches, mean of the seeds. If more parameters served only these "
        "branches, their share follows after *of*. *Export*: *yes*, or *zeros* if a block must stay in full with "
        "zeros for weights. The reasons are listed below. *Code*: transformers loads the network, with whole and with "
        "half blocks removed, in a process that cannot import timm_eps; outputs are equal bit for bit. *pt2*: the same "
        "for `model.pt2` and plain torch.",
        "",
        "| module | class: blocks | smallest (and others) | gates | removed | freed | exact | export | code | pt2 |",
        "|---|---|---|---:|---:|---:|---|---|---|---|",
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in rows:
        seen, found = scanned[name], tried[name]
        export = "yes"
        if found["export"] is not None:
            export = "zeros" if found.get("export_with_zeros", "") is None else "no"
            reasons[reason_of(found["export"])].append(name)
        refused = sum(number for reason, number in seen["refused"].items())
        freed = f"{100 * statistics.mean(found['freed']):.1f} %"
        if not all_freed(found):
            freed += f" of {100 * statistics.mean(found['dead']):.1f} %"
        exact = "yes" if found["open_equal"] and all(found["exact"]) and all(found["rebuilt"]) else "**no**"
        kind = f"{seen['module']} | {seen['class']}: {', '.join(seen['blocks'])}"
        lines.append(
            f"| {kind} | `{name}` (+{len(standing[name]) - 1}) "
            f"| {seen['gates']}{f', −{refused}' if refused else ''} "
            f"| {sum(found['removed'])} of {sum(found['shut'])} | {freed} | {exact} | {export} "
            f"| {' | '.join('yes' if is_shipped(name, form) else '**no**' for form in FORMS)} |"
        )
    lines += ["", *tools_table(tools, rows)]
    lines += ["", *shipping_obstacles(shipped, rows)]
    lines += ["", "## Why some cannot be exported without zeros", ""]
    lines += [f"- {reason}: {', '.join(f'`{name}`' for name in names)}" for reason, names in sorted(reasons.items())]
    lines += ["", "## Slots without a gate", ""]
    slots: dict[str, Counter] = defaultdict(Counter)
    for seen in scanned.values():
        for reason, number in seen["refused"].items():
            slots[stated(reason)][seen["module"]] += number
    for reason, modules in sorted(slots.items()):
        lines.append(f"- {reason}: {', '.join(f'{module} ({number})' for module, number in sorted(modules.items()))}")
    lines += ["", "## Architectures without a gate", ""]
    without: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, seen in scanned.items():
        if not seen["gates"]:
            why = "; ".join(stated(reason) for reason in sorted(seen["refused"])) or "no stochastic-depth slot"
            without[why][seen["module"]].append(name)
    for reason, modules in sorted(without.items()):
        listed = []
        for module, names in sorted(modules.items()):
            everything = sum(seen["module"] == module for seen in scanned.values())
            listed.append(module if len(names) == everything else f"of {module}: {', '.join(f'`{n}`' for n in names)}")
        lines.append(f"- {reason}: {'; '.join(listed)}")
    return "\n".join(lines) + "\n"


def stated(reason: str) -> str:
    """The reason why a slot has no gate, with the slot as its subject and without the explanation."""
    return f"the slot {reason.removeprefix('it ')}" if reason.startswith("it ") else reason.partition(":")[0]


def reason_of(message: str) -> str:
    """The kind of obstacle in an error of export_timm."""
    for needle, reason in {
        "is not an identity without": "a block without its branches is not an identity",
        "is not in a sequence": "a block has its own name and is not an element of a sequence",
        "depend on their position": "blocks depend on their position, so they cannot be renumbered",
        "would have no block": "a stage would be left without a block",
        "from a directory": "timm does not build the architecture from a directory",
        "with this number of blocks": "timm's entrypoint has no argument for the number of these blocks",
    }.items():
        if needle in message:
            return reason
    return message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="part of a timm module's name")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.getLogger("timm_eps").setLevel(logging.ERROR)
    stored: dict[str, Any] = {"timm": timm.__version__, "scanned": {}, "tried": {}, "tools": {}}
    if STORE.exists() and (old := json.loads(STORE.read_text()))["timm"] == timm.__version__:
        stored = old
    for name in timm.list_models(exclude_filters="eps_*"):
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        if name not in stored["scanned"] and (only is None or only in module):
            stored["scanned"][name] = scan(name)
            print(f"{name}: {stored['scanned'][name]['gates']} gates", flush=True)
    store(stored, only)
    for name in representatives(stored["scanned"]):
        if only is None and name not in stored["tried"]:
            stored["tried"][name] = try_out(name)
            store(stored, only)
        elif only is not None and only in stored["scanned"][name]["module"]:
            stored["tried"][name] = try_out(name)
        else:
            continue
        print(name, stored["tried"][name], flush=True)
    # One process for each, because a failed TorchScript compilation affects later ones.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in representatives(stored["scanned"]):
            if (only is None and name not in stored["tools"]) or (
                only is not None and only in stored["scanned"][name]["module"]
            ):
                obstacles = processes.submit(try_tools, name, SHORTENED.get(name, {})).result()
                stored["tools"][name] = {"versions": versions(), "obstacles": obstacles}
                store(stored, only)
                print(name, stored["tools"][name], flush=True)
    with Elsewhere() as elsewhere:
        for name in representatives(stored["scanned"]):
            is_asked = only is not None and only in stored["scanned"][name]["module"]
            if is_asked or (only is None and name not in stored.setdefault("shipped", {})):
                obstacles = try_shipping(name, SHORTENED.get(name, {}), elsewhere)
                stored.setdefault("shipped", {})[name] = {"versions": versions(), "obstacles": obstacles}
                store(stored, only)
                print(name, stored["shipped"][name], flush=True)
    if only is None:
        text = document(*(stored[part] for part in ("scanned", "tried", "tools", "shipped")))
        (ROOT / "docs" / "coverage.md").write_text(text, encoding="utf-8")


def store(found: dict[str, Any], only: str | None) -> None:
    if only is None:
        STORE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
