"""Classes for transformers: configuration, models, side supervision, distillation and a Trainer callback."""
