"""How a pruned network loads where this package is not installed: by the code beside it, and by plain torch.

Two states of one architecture are saved with ``remote_code`` and ``exported_program``. Another process, which cannot
import timm_eps, loads both forms and compares outputs. Run as a script, with the directories as arguments, this file is
that process.
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


def try_shipping(name: str, arguments: dict[str, Any]) -> dict[str, dict[str, str | None]]:
    """For each form, the obstacle in each of the states; None where outputs are equal bit for bit."""
    import torch
    from safetensors.torch import load_file

    import timm_eps
    from benchmarks.tools import in_states
    from timm_eps.surgery.branches import evaluating, probe_batch

    models = in_states(name, arguments)
    found: dict[str, dict[str, str | None]] = {form: {} for form in FORMS}
    with tempfile.TemporaryDirectory() as root:
        directories = {}
        for number, state in enumerate(STATES):
            model, directory = models[state], Path(root) / f"state{number}"
            batch = probe_batch(model, batch_size=3)
            with evaluating(model):
                (Path(root) / "expected").mkdir(exist_ok=True)
                torch.save((batch, model(batch)), Path(root) / "expected" / f"{directory.name}.pt")
            directories[state] = directory
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
        command = [sys.executable, __file__, *map(str, directories.values())]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{name}: {run.stderr[-2000:]}")
        answers = json.loads(run.stdout.splitlines()[-1])
    for state, directory in directories.items():
        for form in FORMS:
            found[form].setdefault(state, answers[directory.name][form])
    return found


def load_here(directory: Path) -> dict[str, str | None]:
    """Load both forms and compare them with what the network computed; the obstacles."""
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
        except Exception as error:  # whatever a loader raises
            answers[form] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return answers


if __name__ == "__main__":
    sys.modules["timm_eps"] = None  # type: ignore[assignment]  no import finds it
    warnings.simplefilter("ignore")
    print(json.dumps({Path(path).name: load_here(Path(path)) for path in sys.argv[1:]}))
