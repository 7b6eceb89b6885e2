"""The oldest versions that pyproject.toml admits: Python, every dependency, and the dependencies of the extras.

As a script it prints them for pip, one per line: ``python tests/floors.py > floors.txt && pip install -r floors.txt``.
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
        ValueError: The specifier has no such bound, or several.
    """
    bounds = [Version(specifier.version) for specifier in specifiers if specifier.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{str(specifiers)!r} has no one oldest version; write it as >=1.2.")
    return bounds[0]


def requirements(without: Collection[str] = ()) -> Iterator[Requirement]:
    """All dependencies of this package and its extras, without the named extras and without the package itself."""
    project = pyproject()["project"]
    extras = (lines for extra, lines in project["optional-dependencies"].items() if extra not in without)
    for line in chain(pyproject()["build-system"]["requires"], project["dependencies"], *extras):
        requirement = Requirement(line)
        if requirement.name != project["name"]:
            yield requirement


def main() -> None:
    # Building the documentation needs a newer jinja2 than running a model.
    for requirement in requirements(without=("docs",)):
        print(f"{requirement.name}=={floor(requirement.specifier)}")


if __name__ == "__main__":
    main()
