"""Mutations of config.json, as a tree and as bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from .draft import Draft, Rng, short
from .files import CONFIG, at, paths_of
from .values import KEYWORDS, SPECIFIC, evil_cfg, flip, generic_value, splice


def _hosts(draft: Draft) -> list[tuple[Any, ...]]:
    """The objects in the configuration that take keywords."""
    found = [path for path in ((), ("model_args",), ("pretrained_cfg",)) if path == () or path[0] in draft.config]
    return [path for path in found if isinstance(at(draft.config, path), dict)]


def change_field(draft: Draft, rng: Rng) -> str:
    """Another value, name or kind for any field at any depth."""
    paths = list(paths_of(draft.config))
    # Fields first: a long list of labels would take most of the draws by number.
    named = [path for path in paths if isinstance(path[-1], str)]
    path = rng.choice(named if named and rng.random() < 0.85 else paths)
    name, value, parent = path[-1], at(draft.config, path), at(draft.config, path[:-1])
    where = ".".join(map(str, path))
    action = rng.random()
    if action < 0.08:
        del parent[name]
        return f"without {where}"
    if action < 0.14 and isinstance(parent, dict):
        near = rng.choice([f"{name}s", f"_{name}", str(name).upper(), f" {name}", f"{name}\u200b", str(name)[:-1]])
        parent[near] = parent.pop(name)
        return f"{where} is called {near[:40]!r}"
    if action < 0.34:
        parent[name] = _near(value, rng)
    elif action < 0.74 and name in SPECIFIC:
        drawn = SPECIFIC[name]
        # A copy: later mutations change what stands in the tree.
        parent[name] = copy.deepcopy(rng.choice(drawn)) if isinstance(drawn, list) else drawn(draft, rng)
    else:
        parent[name] = generic_value(draft, rng)
    return f"{where} = {short(parent[name])}"


def _near(value: Any, rng: Rng) -> Any:
    """A value of another kind that looks the same, or one that is a little off."""
    if isinstance(value, bool) or value is None:
        return rng.choice([not value, str(value), 0, 1, [value]])
    if isinstance(value, int | float):
        return rng.choice(
            [value + 1, value - 1, -value, value * 1000, str(value), [value], float(value), {"value": value}]
        )
    if isinstance(value, str):
        return rng.choice(
            [
                value + " ",
                value.upper(),
                value[:-1],
                value * 2,
                [value],
                {value: value},
                value.encode(errors="surrogatepass").hex(),
            ]
        )
    if isinstance(value, list):
        shuffled = rng.sample(value, len(value))
        return rng.choice(
            [shuffled, value + value[-1:], value[:-1], value * 2, [value], dict(enumerate(value)), str(value)]
        )
    return rng.choice([list(value.items()), [value], str(value), {**value, "x": 1}, list(value)])


def add_keyword(draft: Draft, rng: Rng) -> str:
    """A keyword of timm or transformers that no structure needs."""
    hosts = _hosts(draft)
    weights = [{(): 2, ("model_args",): 4, ("pretrained_cfg",): 2}[host] for host in hosts]
    host = rng.choices(hosts, weights)[0]
    chosen = rng.sample(sorted(KEYWORDS), rng.choice([1, 1, 1, 2, 3]))
    for name in chosen:
        at(draft.config, host)[name] = KEYWORDS[name](draft, rng)
    return f"{'.'.join(host) or 'root'} has " + ", ".join(
        f"{name}={short(at(draft.config, host)[name])}" for name in chosen
    )


def name_a_source(draft: Draft, rng: Rng) -> str:
    """Keywords that fit each other: load weights, from there, into that directory."""
    host = rng.choice(_hosts(draft))
    target = at(draft.config, host)
    if host == ("pretrained_cfg",):
        target.update(evil_cfg(draft, rng))
    else:
        target.update(pretrained=True, cache_dir=str(draft.canary / "cache"))
        target[rng.choice(["pretrained_cfg_overlay", "pretrained_cfg"])] = evil_cfg(draft, rng)
    return f"{'.'.join(host) or 'root'} names a source of weights"


def take_other_config(draft: Draft, rng: Rng) -> str:
    """The configuration of another network, in whole or one object of it."""
    other = draft.others[rng.choice(sorted(draft.others))]
    theirs = json.loads(other.directory.text(CONFIG) or b"{}")
    if rng.random() < 0.5:
        draft.config = theirs
        return f"the configuration of {other.name}"
    name = rng.choice(["model_args", "pretrained_cfg", "label_names", "architecture"])
    draft.config[name] = theirs.get(name)
    return f"{name} of {other.name}"


# ---- config.json as bytes


def spoil_text(draft: Draft, rng: Rng) -> str:
    """A configuration that no dump of a tree gives."""
    text = draft.config_bytes()
    kind = rng.choice(list(_TEXTS))
    draft.text = _TEXTS[kind](text, rng)
    return f"config.json: {kind}"


def _after_brace(text: bytes, entry: str) -> bytes:
    return text.replace(b"{", b"{" + entry.encode() + b", ", 1)


_TEXTS: dict[str, Callable[[bytes, Rng], bytes]] = {
    "empty": lambda t, r: r.choice([b"", b" ", b"\n", b"\x00"]),
    "cut": lambda t, r: t[: r.randrange(len(t) + 1)],
    "flipped bits": flip,
    "spliced": splice,
    "byte order mark": lambda t, r: b"\xef\xbb\xbf" + t,
    "utf-16": lambda t, r: t.decode("utf-8", "replace").encode("utf-16"),
    "latin-1": lambda t, r: t.replace(b"LABEL", b"\xe9\xff").replace(b"ape", b"\xe9"),
    "no object": lambda t, r: r.choice([b"[]", b"[" + t + b"]", b"3", b'"x"', b"null", b"true", b"NaN"]),
    "trailing": lambda t, r: t + r.choice([b"x", b"{}", t, b"\x00", b","]),
    "nested 100,000 deep": lambda t, r: r.choice([b"[" * 100_000, _after_brace(t, '"deep": ' + '{"a": ' * 100_000)]),
    "nested 100,000 deep and closed": lambda t, r: _after_brace(t, '"deep": ' + "[" * 100_000 + "]" * 100_000),
    "5,000 digits": lambda t, r: _after_brace(t, '"number": ' + "9" * 5000),
    "NaN": lambda t, r: _after_brace(t, r.choice(['"side_loss_weight": NaN', '"x": -Infinity', '"x": NaN'])),
    "key twice": lambda t, r: t.rstrip().removesuffix(b"}") + r.choice(
        [
            b', "model_args": {"removed": []}}', b', "architecture": "eps_resnet32"}', b', "model_args": null}',
            b', "num_classes": 3}', b', "model_type": "resnet"}', b', "pretrained_cfg": {}}',
        ]
    ),
    "comments": lambda t, r: b"// x\n" + t,
    "single quotes": lambda t, r: t.replace(b'"', b"'"),
    "8 MB of spaces": lambda t, r: t + b" " * 8_000_000,
    "many keys": lambda t, r: _after_brace(t, ", ".join(f'"k{i}": {i}' for i in range(50_000))),
}  # fmt: skip
