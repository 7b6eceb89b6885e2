"""What serves ``train_hf.py`` alone. Nothing else in the package imports it."""
