"""The cost of registering all models: seconds to import timm_eps after timm and transformers, in new processes.

    python -m benchmarks.import_cost

The classes of transformers that this package uses are imported first, because transformers loads them, and torch's
compiler, on first use. The output shows the time for this import too.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys

PROCESS = """
import time
import timm, transformers
start = time.perf_counter()
from transformers import AutoModelForImageClassification, TimmWrapperForImageClassification, TimmWrapperImageProcessor
loaded = time.perf_counter()
import timm_eps
print(loaded - start, time.perf_counter() - loaded, len(timm.list_models("eps_*")))
"""


def main(repeats: int = 7) -> None:
    answers = [
        subprocess.run([sys.executable, "-c", PROCESS], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(repeats)
    ]
    classes, own = ([float(answer[column]) for answer in answers] for column in (0, 1))
    print(
        f"import timm_eps: median {statistics.median(own):.3f} s ({min(own):.3f} to {max(own):.3f}, {repeats} "
        f"processes), registers {answers[0][2]} architectures; transformers' classes before it "
        f"{statistics.median(classes):.2f} s; {platform.machine()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
