"""Loading of pruned networks without this package: by the code beside the weights, and by plain torch.

Two states of one architecture are saved with ``remote_code`` and ``exported_program``. Another process, which cannot
import timm_eps, loads both forms and compares outputs. Run as a script, this file is that process: it reads the paths
of directories and writes its findings.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

STATES = ("whole blocks removed", "half blocks removed")
FORMS = ("transformers, trust_remote_code=True", "torch.export.load")


class Elsewhere:
    """A process that cannot import timm_eps, for as long as the context lasts."""

    def __enter__(self) -> Elsewhere:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def load(self, directory: Path) -> dict[str, str | None]:
        """For each form, the reason why it does not load in that process or gives other outputs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(directory, file=self._process.stdin, flush=True)
        answer: dict[str, str | None] = json.loads(self._process.stdout.readline())
        return answer


def try_shipping(name: str, arguments: dict[str, Any], elsewhere: Elsewhere) -> dict[str, dict[str, str | None]]:
    """For each form, the obstacle in each of the states; None where outputs are equal bit for bit."""
    import torch
    from safetensors.torch import load_file

    import timm_eps
    from benchmarks.tools import in_states
    from timm_eps.surgery.branches import evaluating, probe_batch

    models = in_states(name, arguments)
    found: dict[str, dict[str, str | None]] = {form: {} for form in FORMS}
    with tempfile.TemporaryDirectory() as root:
        for number, state in enumerate(STATES):
            model, directory = models[state], Path(root) / f"state{number}"
            batch = probe_batch(model, batch_size=3)
            with evaluating(model):
                (Path(root) / "expected").mkdir(exist_ok=True)
                torch.save((batch, model(batch)), Path(root) / "expected" / f"{directory.name}.pt")
            for form, save in {
                FORMS[0]: lambda model=model, directory=directory: timm_eps.save_pretrained(
                    model, directory, remote_code=True
                ),
                FORMS[1]: lambda model=model, directory=directory: timm_eps.export_program(
                    model, directory / "model.pt2"
                ),
            }.items():
                try:
                    save()
                except ValueError as error:
                    found[form][state] = str(error)[:300]
            if (directory / "model.safetensors").exists():
                held = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
                own = sum(tensor.nbytes for tensor in {id(t): t for t in model.state_dict().values()}.values())
                assert held <= own, f"{name} is larger on disk than in memory"
            answers = elsewhere.load(directory)
            for form in FORMS:
                found[form].setdefault(state, answers[form])
    return found


def load_here(directory: Path) -> dict[str, str | None]:
    """Load both forms and compare their outputs with the stored outputs. Returns the obstacles."""
    import torch
    from torch.utils._pytree import tree_leaves
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    images, expected = torch.load(directory.parent / "expected" / f"{directory.name}.pt", weights_only=False)

    def by_transformers() -> Any:
        has_classes = AutoConfig.from_pretrained(directory, trust_remote_code=True).num_labels
        kind = AutoModelForImageClassification if has_classes else AutoModel
        model = kind.from_pretrained(directory, trust_remote_code=True)
        return model(images).logits if has_classes else model.timm_model(images)

    def by_torch() -> Any:
        program = torch.export.load(directory / "model.pt2").module()
        single = program(images[:1])
        assert [one.shape[0] for one in tree_leaves(single)][:1] == [1]
        return program(images)

    answers: dict[str, str | None] = {}
    for form, load in zip(FORMS, (by_transformers, by_torch), strict=True):
        try:
            with torch.no_grad():
                pairs = zip(tree_leaves(expected), tree_leaves(load()), strict=True)
                same = all(torch.equal(one, other) for one, other in pairs)
            answers[form] = None if same else "it computes something else"
        except Exception as error:  # loaders raise any kind of error
            answers[form] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return answers


if __name__ == "__main__":
    sys.modules["timm_eps"] = None  # type: ignore[assignment]  blocks the import
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        print(json.dumps(load_here(Path(line.strip()))), flush=True)
