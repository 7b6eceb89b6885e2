"""Shrinking a pretrained network: ε-ResNet compared with other methods for fine-tuning."""
