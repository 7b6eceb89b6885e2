"""pyproject.toml states the oldest versions, and `.ci/floors` installs exactly these versions."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions, version

import pytest
from floors import ROOT, floor, pyproject, requirements
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

EVERY = list(requirements())
# Not installed in the environment of the tests.
TOOLS = {"furo", "hatchling", "mypy", "myst-parser", "pre-commit", "ruff", "sphinx"}
KNOWN = {canonicalize_name(requirement.name) for requirement in EVERY}
PROVIDERS = packages_distributions()
CODE = [path for place in ("timm_eps", "tests", "benchmarks") for path in (ROOT / place).rglob("*.py")]
LOCAL = {"benchmarks", "timm_eps", *(path.stem for path in (*ROOT.glob("*.py"), *(ROOT / "tests").iterdir()))}


def test_extras_can_be_left_out():
    names = {requirement.name for requirement in requirements(without=("docs",))}
    assert {each.name for each in EVERY} - names == {"furo", "myst-parser", "sphinx"}


def test_the_extras_are_among_them():
    assert {"torch", "hatchling", "accelerate", "torch-pruning", "pytest", "ruff"} <= {each.name for each in EVERY}


@pytest.mark.parametrize("requirement", EVERY, ids=str)
def test_every_dependency_has_a_floor_that_is_installed_or_older(requirement):
    oldest = floor(requirement.specifier)
    if requirement.name not in TOOLS:
        assert oldest <= Version(version(requirement.name))


@pytest.mark.parametrize("path", [*CODE, *ROOT.glob("*.py")], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_a_dependency(path):
    """An import that only another dependency installs would have no stated oldest version."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    for name in names - LOCAL - sys.stdlib_module_names:
        assert KNOWN & {canonicalize_name(provider) for provider in PROVIDERS[name]}, f"{name} is not in pyproject.toml"


@pytest.mark.parametrize("requirement", ["torch", "torch<3", "torch>2.6", "torch>=2.6,>=2.7"])
def test_other_bounds_are_no_floor(requirement):
    with pytest.raises(ValueError, match="has no one oldest version; write it as"):
        floor(Requirement(requirement).specifier)


def test_python_is_the_one_that_the_linters_check_for():
    oldest = floor(SpecifierSet(pyproject()["project"]["requires-python"]))
    tools = pyproject()["tool"]
    assert tools["mypy"]["python_version"] == f"{oldest.major}.{oldest.minor}"
    assert tools["ruff"]["target-version"] == f"py{oldest.major}{oldest.minor}"
    assert sys.version_info >= oldest.release
