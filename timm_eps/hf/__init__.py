"""Classes for transformers: configuration, models, side supervision, distillation and the callback of Trainer."""
