"""Write MODEL_CARD.md and docs/blocks.png from one default run with its dense counterpart.

python benchmarks/model_card.py
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_hf  # noqa: E402
from timm_eps.hub.saving import render_card  # noqa: E402

NAME = "eps_resnet110-digits"


def main() -> None:
    output = ROOT / "outputs" / NAME
    results = train_hf.main(["--compare_dense", "--output_dir", str(output)])
    shutil.copyfile(output / "blocks.png", ROOT / "docs" / "blocks.png")
    counts = {name: results[name] for name in ("blocks_total", "blocks_kept")}
    card = render_card(results["architecture"], NAME, **counts, results=results, picture="docs/blocks.png")
    card.save(ROOT / "MODEL_CARD.md")


if __name__ == "__main__":
    main()
