"""What each figure in the documents comes from; ``python -m benchmarks`` compares ε-ResNet with its alternatives."""
