"""``python -m timm_eps``: the command ``timm-eps``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
