"""All arguments of a run, by group."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

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
from .options import flag, option

__all__ = ["Arguments"]


@dataclass
class Arguments:
    """The arguments of a run by group, because most functions need only one or two groups."""

    model: ModelArguments
    data: DataArguments
    pruning: PruningArguments
    distillation: DistillationArguments
    training: TrainingArguments
    checkpoints: CheckpointArguments
    saving: SavingArguments
    paper: PaperArguments
    config: str | None = option("JSON file with arguments by name; flags on the command line take precedence")
    output_dir: str = option("default outputs/<architecture>-<data set>")
    dry_run: bool = flag("show what can be removed and what it costs; no training")

    @classmethod
    def groups(cls) -> dict[str, Any]:
        """The dataclass of each group, by the name of its field."""
        return {name: kind for name, kind in get_type_hints(cls).items() if is_dataclass(kind)}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Arguments:
        """Arguments from one dictionary by name, the result of :meth:`flat`."""
        parts = {
            name: kind(**{each.name: values[each.name] for each in fields(kind)}) for name, kind in cls.groups().items()
        }
        return cls(**parts, **{each.name: values[each.name] for each in fields(cls) if each.metadata})

    def flat(self) -> dict[str, Any]:
        """All arguments by name. Each name is a flag."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.metadata}
        for name in self.groups():
            found |= vars(getattr(self, name))
        return found

    def changed(self, **values: Any) -> Arguments:
        """A copy with other values of some arguments. They are not checked."""
        return self.of(self.flat() | values)
