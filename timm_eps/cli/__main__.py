"""``python -m timm_eps.cli``: the command ``timm-eps``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
