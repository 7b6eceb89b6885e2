"""Measurements of timm_eps. Each module says in its first lines how to run it."""

import os

# Before torch is loaded: waiting threads sleep. Otherwise they take the time of other processes, which makes both slow.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
