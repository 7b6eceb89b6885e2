"""Hashes of the files that four short runs write, to show that a refactoring changes no number.

    python tests/golden.py > before.txt    # then move code
    python tests/golden.py | diff before.txt -

The hashes hold for one machine and one set of versions: other processors round differently.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import train_hf  # noqa: E402

SHORT = [
    *("--architecture", "eps_resnet20", "--num_train_epochs", "4", "--max_train_samples", "200"),
    *("--epsilon_warmup_epochs", "1", "--ramp_epochs", "2", "--patience", "1", "--keep", "3"),
]
IMPORTANCE = [
    *("--num_train_epochs", "2", "--criterion", "importance", "--epsilon_warmup_epochs", "1", "--ramp_epochs", "1"),
    *("--patience", "1"),
]


def main() -> None:
    """Print a line for each run: the name and the hash of the file."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        run(out / "default")
        run(out / "importance", *IMPORTANCE)
        run(out / "resumed", *SHORT, "--checkpointing_steps", "epoch")
        for checkpoint in ("checkpoint-6", "checkpoint-8"):  # the run resumes after the first epoch
            os.rename(out / "resumed" / checkpoint, out / checkpoint)
        run(out / "resumed", *SHORT, "--checkpointing_steps", "epoch", "--resume_from_checkpoint")
        run(out / "onnx", *SHORT, "--num_train_epochs", "2", "--with_onnx")
        for kind, file in {"default": "", "importance": "", "resumed": "", "onnx": "onnx/model.onnx"}.items():
            content = (out / kind / (file or "model.safetensors")).read_bytes()
            print(f"{kind:<12}{hashlib.sha256(content).hexdigest()}")


def run(out: Path, *arguments: str) -> None:
    """Run the script once. Its messages go to stderr."""
    said, sys.stdout = sys.stdout, sys.stderr
    try:
        train_hf.main(["--num_threads", "1", "--output_dir", str(out), *arguments])
    finally:
        sys.stdout = said


if __name__ == "__main__":
    main()
