"""Directories and repositories with a model, its card and its pictures, and networks for other runtimes."""
