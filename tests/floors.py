"""The oldest versions that pyproject.toml admits: of Python, of every dependency, and of those of the extras.

As a script it prints them for pip, one a line: ``python tests/floors.py > floors.txt && pip install -r floors.txt``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pyproject() -> dict[str, Any]:
    """All of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def floor(specifiers: SpecifierSet) -> Version:
    """The version that ``>=`` names.

    Raises:
        ValueError: There is no such bound, or more than one.
    """
    bounds = [Version(specifier.version) for specifier in specifiers if specifier.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{str(specifiers)!r} has no one oldest version; write it as >=1.2.")
    return bounds[0]


def requirements(without: Collection[str] = ()) -> Iterator[Requirement]:
    """Everything that pip may install for this package, without some extras and those that it names of itself."""
    project = pyproject()["project"]
    extras = (lines for extra, lines in project["optional-dependencies"].items() if extra not in without)
    for line in chain(pyproject()["build-system"]["requires"], project["dependencies"], *extras):
        requirement = Requirement(line)
        if requirement.name != project["name"]:
            yield requirement


def main() -> None:
    # Who builds the documentation needs a younger jinja2 than who runs a model.
    for requirement in requirements(without=("docs",)):
        print(f"{requirement.name}=={floor(requirement.specifier)}")


if __name__ == "__main__":
    main()
