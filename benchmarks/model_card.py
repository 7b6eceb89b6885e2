"""Write MODEL_CARD.md and docs/blocks.png from one default run with its dense counterpart.

python -m benchmarks.model_card
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from timm_eps.hub.card import render_card

ROOT = Path(__file__).parent.parent
NAME = "eps_resnet110-digits"


def main() -> None:
    output = ROOT / "outputs" / NAME
    command = [sys.executable, str(ROOT / "train_hf.py"), "--compare_dense", "--output_dir", str(output)]
    subprocess.run(command, check=True)
    results = json.loads((output / "all_results.json").read_text())
    shutil.copyfile(output / "blocks.png", ROOT / "docs" / "blocks.png")
    counts = {name: results[name] for name in ("blocks_total", "blocks_kept")}
    described = json.loads((output / "config.json").read_text())
    card = render_card(
        results["architecture"],
        NAME,
        **counts,
        label_names=described["label_names"],
        input_size=described["pretrained_cfg"]["input_size"],
        results=results,
        picture="docs/blocks.png",
    )
    card.save(ROOT / "MODEL_CARD.md")


if __name__ == "__main__":
    main()
