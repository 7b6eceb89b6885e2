"""Removal of branches at once: in a given order for a budget, or by name."""
