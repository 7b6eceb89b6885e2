"""The documentation is correct: its code runs, its links have targets, and it covers every public name."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import timm_eps
from timm_eps.analysis import measure

ROOT = Path(__file__).parent.parent
CODE = ["README.md", "docs/start.md", "docs/concepts.md", "docs/shrink.md", "docs/ship.md", "docs/train.md"]
SAVING = ["README.md", "docs/start.md", "docs/shrink.md", "docs/ship.md", "docs/train.md"]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "benchmarks")
PAGES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in folder.glob("*.md"))
REFERENCE = ROOT / "docs/reference.md"


@pytest.fixture(autouse=True)
def quick(times_measured_once, monkeypatch):
    """One thread, because threads of tiny layers wait for each other on a busy machine.

    Each time is measured once and without warm-up: no page depends on it.
    """
    latency, inside = measure.paired_latency, measure._block_milliseconds
    monkeypatch.setattr(measure, "paired_latency", lambda nets, batch, *_: latency(nets, batch, 1, 0))
    monkeypatch.setattr(measure, "_block_milliseconds", lambda *measured: inside(*measured, warmup=0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blocks(text: str) -> list[str]:
    """The Python code blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def run(code: list[str], where: str, namespace: dict[str, Any]) -> dict[str, Any]:
    for block in code:
        exec(compile(block, where, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("document", [*CODE, "docs/reference.md"])
def test_code_runs(document, tmp_path, monkeypatch, times_measured_once):
    monkeypatch.chdir(tmp_path)
    code = blocks((ROOT / document).read_text(encoding="utf-8"))
    assert code
    # The proofs take seconds less on a small network.
    code = [block.replace('"tf_efficientnet_lite0"', '"test_resnet"') for block in code]
    run(code, document, {})
    if document in SAVING:
        assert (tmp_path / "out" / "model.safetensors").exists()


def literal_blocks(docstring: str) -> list[str]:
    """The code blocks of a docstring: indented text after a line that ends with two colons."""
    found, lines = [], inspect.cleandoc(docstring).splitlines()
    for number, line in enumerate(lines):
        if line.endswith("::"):
            indent = len(line) - len(line.lstrip())
            code = []
            for following in lines[number + 1 :]:
                if following.strip() and len(following) - len(following.lstrip()) <= indent:
                    break
                code.append(following)
            found.append(textwrap.dedent("\n".join(code)).strip() + "\n")
    return found


def names_in_reference() -> dict[str, str]:
    """The text of the page about each public name, from its directive to the next one."""
    directive = r"^\.\. auto(?:function|class):: timm_eps\.(\S+)$"
    parts = re.split(directive, REFERENCE.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_reference_has_every_public_name():
    assert set(timm_eps.__all__) <= set(names_in_reference())


# Each of these analyzes a network or measures its latency. The pages run the same code by default.
LONG = {"Analysis", "Budget", "analyze", "gathered", "write_page"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in timm_eps.__all__]
)
def test_docstring_has_an_example_that_runs(name, tmp_path, monkeypatch, times_measured_once):
    monkeypatch.chdir(tmp_path)
    examples = literal_blocks(getattr(timm_eps, name).__doc__)
    # The page has the example if it needs a server or is too long for the docstring.
    assert examples or f"timm_eps.{name}(" in names_in_reference()[name]
    run([blocks(REFERENCE.read_text(encoding="utf-8"))[0], *examples], name, {})


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, by the rules of GitHub and MyST."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number, unique = 0, slug
        while unique in found:
            number += 1
            unique = f"{slug}-{number}"
        found.add(unique)
    return found


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        there = path.parent / place if place else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_checked():
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/evidence.md", "docs/reliability.md"} <= set(PAGES)
    assert {"MODEL_CARD.md", "CHANGELOG.md", "docs/coverage.md", "docs/reference.md"} <= set(PAGES)
    assert set(CODE) <= set(PAGES)


@pytest.mark.parametrize("document", [page for page in PAGES if page.startswith("docs/")])
def test_every_page_is_in_the_navigation(document):
    name = Path(document).stem
    trees = re.findall(r"^```{toctree}\n(.*?)^```", (ROOT / "docs/index.md").read_text(encoding="utf-8"), re.M | re.S)
    listed = {line.partition("<")[2].rstrip(">") or line for tree in trees for line in tree.splitlines()}
    assert name == "index" or name in listed


def test_readme_commands_are_what_ci_runs():
    readme, ci = (ROOT / name for name in ("README.md", ".ci/run"))
    assert 'pip install -e ".[train]" && accelerate launch train_hf.py\n' in readme.read_text(encoding="utf-8")
    assert 'pip install -e ".[test]" && pytest' in readme.read_text(encoding="utf-8")
    assert 'pip install --quiet -e ".[test]"\npytest\n' in ci.read_text(encoding="utf-8")
