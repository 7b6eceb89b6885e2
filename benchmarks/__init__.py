"""Measurements of timm_eps. Each module says in its first lines how to run it."""
