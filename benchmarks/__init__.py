"""The sources of all figures in the documents. ``python -m benchmarks`` compares ε-ResNet with its alternatives."""
