"""Allowed imports between the parts of the package: a part imports the parts before it, never those after it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "timm_eps"
# Rooms and files at the root, from the lowest to the highest.
ORDER = [
    "names", "learning_rate", "gate", "files", "surgery", "report", "budget", "schedule", "analysis", "importance",
    "cost_schedule", "criteria", "cutting", "thresholds", "pruner", "models", "hf", "hub", "page", "__init__",
    "training", "cli",
]  # fmt: skip
# The rooms that may import each library. All other rooms need only torch and timm.
LIBRARIES = {
    "transformers": {"hf", "hub", "page", "files", "training", "cli"},
    "accelerate": {"training"},
    "datasets": {"training"},
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """The room or the file at the root that contains a module."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Full names of all imports of a file, including imports inside functions."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def test_all_parts_are_known():
    assert {part_of(module_of(path)) for path in FILES} == set(ORDER)
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    here = part_of(module_of(path))
    for name in imports(path):
        if name == "timm_eps" or name.startswith("timm_eps."):
            there = part_of(name) if part_of(name) in ORDER else "__init__"  # a public name
            assert ORDER.index(there) <= ORDER.index(here), f"{here} imports {name}"
        elif (library := name.partition(".")[0]) in LIBRARIES:
            assert here in {"__init__", *LIBRARIES[library]}, f"{here} imports {name}"
