"""Parts of the script ``train_hf.py``. The rest of the package does not import them."""
