"""The arguments of ``train_hf.py``: command line, configuration file, and record of a run."""

from .arguments import Arguments
from .groups import (
    CheckpointArguments,
    DataArguments,
    DistillationArguments,
    ModelArguments,
    PaperArguments,
    PruningArguments,
    SavingArguments,
    TrainingArguments,
)  # fmt: skip
from .parsing import parse_arguments
from .record import binding_arguments, hub_id, used_arguments

__all__ = [
    "Arguments", "CheckpointArguments", "DataArguments", "DistillationArguments", "ModelArguments", "PaperArguments",
    "PruningArguments", "SavingArguments", "TrainingArguments", "binding_arguments", "hub_id", "parse_arguments",
    "used_arguments",
]  # fmt: skip
