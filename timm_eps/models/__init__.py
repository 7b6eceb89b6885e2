"""The paper's CIFAR networks and the gated twins of timm's architectures."""
