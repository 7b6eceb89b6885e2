"""Hostile changes to a saved directory. Each is drawn from a random generator alone, so that a case can be repeated.

A mutation takes a :class:`Draft` and a generator, changes the draft and says in a few words what it did. Fields are
found in the config.json at hand: a field that a later version writes is changed like the others.
"""

from __future__ import annotations

import json
from pathlib import Path

from .change_config import add_keyword, change_field, name_a_source, spoil_text, take_other_config
from .change_directory import add_file, change_file
from .change_weights import change_tensors, spoil_bytes, spoil_header, take_other_weights
from .draft import Base, Draft, Mutation, Rng
from .files import CONFIG, WEIGHTS, Directory, bind, digest_in

# Each mutation with the share of draws that it gets, and whether it needs the configuration as a tree.
_MUTATIONS: list[tuple[Mutation, float, bool]] = [
    (change_field, 34, True),
    (add_keyword, 14, True),
    (name_a_source, 3, True),
    (take_other_config, 3, True),
    (spoil_text, 7, False),
    (change_tensors, 18, False),
    (spoil_header, 6, False),
    (spoil_bytes, 5, False),
    (take_other_weights, 2, False),
    (change_file, 4, False),
    (add_file, 5, False),
]


def mutate(base: Base, others: dict[str, Base], canary: Path, rng: Rng) -> tuple[Directory, list[str]]:
    """A hostile directory, and what is hostile about it.

    The digest that binds a configuration to its weights would hide what else is wrong with changed weights, so in
    three of four cases it is that of the changed ones.
    """
    directory = Directory(dict(base.directory.entries))
    original = base.directory.text(WEIGHTS) or b""
    draft = Draft(base, others, canary, json.loads(base.directory.text(CONFIG) or b"{}"), original, directory)
    digest = digest_in(draft.config, original)
    for _ in range(rng.choices([1, 2, 3], [60, 25, 15])[0]):
        is_tree = isinstance(draft.config, dict) and draft.text is None
        usable = [(mutation, share) for mutation, share, needs_tree in _MUTATIONS if is_tree or not needs_tree]
        (mutation,) = rng.choices([mutation for mutation, _ in usable], [share for _, share in usable])
        draft.notes.append(mutation(draft, rng))
    is_tree = isinstance(draft.config, dict) and draft.text is None
    if digest and is_tree and draft.weights not in (None, original) and rng.random() < 0.75:
        bind(draft.config, *digest, draft.weights or b"")
        draft.notes.append("digest of the new weights")
    if draft.config is not None or draft.text:
        directory.entries[CONFIG] = draft.config_bytes()
    if draft.weights is not None:
        directory.entries[WEIGHTS] = draft.weights
    return directory, draft.notes
