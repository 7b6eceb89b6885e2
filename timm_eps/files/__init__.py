"""Reading, checking and writing of model files. Some modules are copied to repositories with remote code."""
