"""Saving and pushing of models with their cards and pictures, and export to other formats."""
