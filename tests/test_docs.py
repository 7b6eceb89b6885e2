"""The code in the README and the guide runs as it stands there, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent


def train_one_epoch(model, optimizer):
    """What the README leaves to its reader."""
    model.train()
    loss = F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.randint(10, (4,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md"])
def test_code_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    namespace: dict = {"train_one_epoch": train_one_epoch}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "document", ["README.md", "docs/guide.md", "docs/reliability.md", "CONTRIBUTING.md", "MODEL_CARD.md"]
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert targets or document in ("CONTRIBUTING.md", "docs/reliability.md")
    for target in targets:
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_readme_commands_are_what_ci_runs():
    readme, ci = (ROOT / name for name in ("README.md", ".ci/run"))
    assert 'pip install -e ".[test]" && pytest' in readme.read_text(encoding="utf-8")
    assert 'pip install --quiet -e ".[test]"\npytest\n' in ci.read_text(encoding="utf-8")
