"""Shrinking a network that begins with pretrained weights: ε-ResNet beside what a fine-tuner would use instead."""
