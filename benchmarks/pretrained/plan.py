"""The trainings of the comparison, the most important ones first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.pretrained.cases import CASES
from benchmarks.pretrained.methods import Job

# Method, and whether it is distilled, by importance. All seeds of a group come before the next group.
DISTILLED = (
    ("dense", False), ("dense", True), ("last", True), ("leave_one_out", True), ("channels_to_size", True),
    ("channels_to_latency", True), ("ramp_response", True), ("ramp_importance", True), ("even", True), ("random", True),
)  # fmt: skip
LABELS_ALONE = (
    ("last", False), ("leave_one_out", False), ("channels_to_size", False), ("channels_to_latency", False),
    ("even", False), ("random", False), ("ramp_response", False), ("ramp_importance", False), ("dense_longer", False),
    ("scratch", False),
)  # fmt: skip
MATTER = (
    ("last", True), ("even", True), ("leave_one_out", True), ("channels_to_size", True), ("channels_to_latency", True),
)  # fmt: skip
TUNED = (("leave_one_out_tuned", True), ("channels_to_size_tuned", True), ("channels_to_latency_tuned", True))
MORE_RANDOM = tuple((f"random{draw}", True) for draw in range(1, 5))
SIBLINGS = (("dense", False), ("sibling", True), ("smaller", True), ("sibling", False))
CRITERIA = (("dense", False), ("last", True), ("leave_one_out", True), ("leave_one_out_per_size", True), ("even", True))
STRUCTURES = (
    ("dense", False), ("last", True), ("even", True), ("stage_ends", True), ("leave_one_out", True),
    ("leave_one_out_by_stage", True),
)  # fmt: skip
MAIN = (("dense", False), ("dense", True), *MATTER, ("random", True))
# The fewest rows that answer the question: is it better than simple cuts, and than removing channels, at one speed?
ESSENTIAL = (
    ("dense", False), ("dense", True), ("last", True), ("leave_one_out", True), ("channels_to_latency", True),
    ("even", True), ("stage_ends", True),
)  # fmt: skip
GROUPS = {
    "dense": (("dense", False),),
    "distilled": DISTILLED,
    "labels": LABELS_ALONE,
    "matter": MATTER,
    "tuned": TUNED,
    "more_random": MORE_RANDOM,
    "siblings": SIBLINGS,
    "criteria": CRITERIA,
    "structures": STRUCTURES,
    "main": MAIN,
    "essential": ESSENTIAL,
}
KEEPS_ALL = ("dense", "dense_longer", "scratch", "smaller")


def jobs(case: str, group: str, images: int, seeds: Iterable[int], keep: int | None = None) -> list[Job]:
    """The trainings of a group, seed by seed, each after its needs.

    Args:
        case: Name in ``CASES``.
        group: Name in ``GROUPS``.
        images: Number of training images.
        seeds: Seeds.
        keep: Number of branches that stay. The default is the case's first number.
    """
    kept = keep or CASES[case].keeps[0]
    wanted = [
        Job(case, method, images, 0 if method in KEEPS_ALL else kept, seed, distilled)
        for seed in seeds
        for method, distilled in GROUPS[group]
    ]
    return with_needs(wanted)


def with_needs(wanted: Sequence[Job]) -> list[Job]:
    """Jobs in order, each after its needs, without repetitions."""
    ordered: dict[Job, None] = {}

    def add(job: Job) -> None:
        for need in job.needs():
            add(need)
        ordered.setdefault(job)

    for job in wanted:
        add(job)
    return list(ordered)
