"""Sections of a page about answers: accuracy, confused classes, and images whose answer changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.answers import Answers
from .comparing import thumbnail
from .numbers import count, percent, points, signed
from .saved import RunResults, SavedNetwork

__all__ = ["accuracy", "confusion", "examples"]

MOST_CLASSES = 20  # limit for a heat map and for the list of classes
MOST_PAIRS = 20
MOST_EXAMPLES = 24


def accuracy(network: SavedNetwork, results: RunResults | None, answers: Answers | None) -> dict[str, Any] | None:
    """Accuracy before and after, overall and by class: measured now, or from the run's results."""
    if answers is not None:
        return {**_measured(answers), "by_class": _measured_classes(network.class_names, answers),
                "run": _of_run(results)}  # fmt: skip
    if results is None or results.accuracy is None:
        return None
    images, dense = results.values.get("eval_images"), results.dense_accuracy
    difference = "" if dense is None else points(results.accuracy - dense)
    short = f"On {count(images)} images. " if images else ""
    short += f"The dense network: {percent(dense)} ({difference})." if dense is not None else ""
    return {
        "now": percent(results.accuracy), "before": None if dense is None else percent(dense), "images": images,
        "difference": difference, "interval": None, "short": short.strip(), "verdict": "", "changes": "", "run": "",
        "by_class": _class_rows(results.dense_by_class, results.by_class),
        "test": _test(results),
    }  # fmt: skip


def _test(results: RunResults) -> str:
    if results.test_accuracy is None:
        return ""
    dense = results.dense_test_accuracy
    before = "" if dense is None else f"; the dense network: {percent(dense)}"
    return f"On the test split, which was looked at once: {percent(results.test_accuracy)}{before}."


def _of_run(results: RunResults | None) -> str:
    if results is None or results.accuracy is None:
        return ""
    dense = "" if results.dense_accuracy is None else f" and {percent(results.dense_accuracy)} for the dense network"
    return f"The run itself measured {percent(results.accuracy)} for the saved network{dense}."


def _measured(answers: Answers) -> dict[str, Any]:
    images, difference = len(answers.labels), answers.difference
    found: dict[str, Any] = {
        "now": percent(answers.accuracy), "before": None, "images": images, "difference": "", "interval": None,
        "short": f"On {count(images)} images.", "verdict": "", "changes": "", "test": "",
    }  # fmt: skip
    if difference is None or answers.accuracy_before is None:
        return found
    found["before"], found["difference"] = percent(answers.accuracy_before), points(difference.value)
    found["interval"] = f"{signed(100 * difference.lower)} to {signed(100 * difference.upper)} points"
    found["short"] = f"The dense network: {found['before']}. Difference {found['difference']} ({found['interval']})."
    found["verdict"] = (
        "The interval contains 0, so these images show no significant difference."
        if difference.lower <= 0 <= difference.upper
        else f"The interval does not contain 0: the pruned network is {'more' if difference.value > 0 else 'less'} "
        "accurate on images like these."
    )
    other = answers.changed - difference.lost - difference.won
    found["changes"] = (
        f"The answer changed for {count(answers.changed)} of {count(images)} images. Right before, wrong now: "
        f"{count(difference.lost)}. Wrong before, right now: {count(difference.won)}. Wrong both times, differently: "
        f"{count(other)}."
        if answers.changed
        else f"Both networks give the same answer for all {count(images)} images."
    )
    return found


def _measured_classes(names: Sequence[str], answers: Answers) -> dict[str, Any] | None:
    after = {names[number]: value for number, value in answers.by_class(answers.after).items()}
    before = {} if answers.before is None else answers.by_class(answers.before)
    return _class_rows({names[number]: value for number, value in before.items()}, after)


def _class_rows(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any] | None:
    """Classes with the positions of both accuracies on an axis that starts at a round number."""
    if len(after) < 2:
        return None
    names = list(after)
    if len(names) > MOST_CLASSES:
        names.sort(key=lambda name: (-abs(after[name] - before.get(name, after[name])), after[name]))
        names = names[:MOST_CLASSES]
    known = [value for name in names for value in (before.get(name), after[name]) if value is not None]
    low = min(math.floor(10 * min(known)) / 10, 0.9)

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / (1 - low), 2)

    rows = []
    for name in names:
        then = before.get(name)
        rows.append({
            "name": name, "now": percent(after[name]), "before": None if then is None else percent(then),
            "at_now": place(after[name]), "at_before": place(then),
            "change": "" if then is None else signed(100 * (after[name] - then)),
            "is_worse": then is not None and after[name] < then,
        })  # fmt: skip
    return {"rows": rows, "low": percent(low, 0), "total": len(after), "compares": bool(before)}


def confusion(names: Sequence[str], answers: Answers | None) -> dict[str, Any] | None:
    """Confused classes: heat maps, or the most frequent confusions if there are many classes."""
    if answers is None:
        return None
    both = {"Dense": answers.before, "Pruned": answers.after}
    given = {name: found for name, found in both.items() if found is not None}
    if answers.classes <= MOST_CLASSES:
        maps = []
        for title, found in given.items():
            cells = answers.confusion(found).tolist()
            rows = [
                {
                    "name": names[true],
                    "cells": [_cell(names, true, column, n, sum(row)) for column, n in enumerate(row)],
                }
                for true, row in enumerate(cells)
            ]
            maps.append({"title": title if len(given) > 1 else "", "rows": rows})
        longest = max(map(len, names))
        return {
            "maps": maps, "names": list(names), "pairs": None, "is_long": longest > 3, "width": min(longest, 15),
        }  # fmt: skip
    counted = {name: answers.confused(found) for name, found in given.items()}
    every = {pair for pairs in counted.values() for pair in pairs}
    if not every:
        return None
    ranked = sorted(every, key=lambda pair: (-max(pairs.get(pair, 0) for pairs in counted.values()), pair))
    pairs = [
        {"true": names[true], "answer": names[answer],
         "counts": [found.get((true, answer), 0) for found in counted.values()]}
        for true, answer in ranked[:MOST_PAIRS]
    ]  # fmt: skip
    return {"maps": None, "pairs": pairs, "columns": list(counted), "total": len(every)}


def _cell(names: Sequence[str], true: int, answer: int, images: int, total: int) -> dict[str, Any]:
    share = images / total if total else 0.0
    return {
        "text": images or "",
        "kind": "right" if true == answer else "wrong",
        # The square root keeps rare confusions visible.
        "shade": round(share if true == answer else math.sqrt(share), 3),
        "title": f"{images} of {total} images of {names[true]!r}: answered {names[answer]!r}",
    }


def examples(names: Sequence[str], answers: Answers | None, cfg: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Images whose answer changed: first the newly wrong ones, then the newly right ones."""
    if answers is None or not (answers.lost or answers.won):
        return None
    half = MOST_EXAMPLES // 2
    lost = answers.lost[: max(half, MOST_EXAMPLES - len(answers.won))]
    won = answers.won[: MOST_EXAMPLES - len(lost)]
    return [
        {"kind": kind, "image": thumbnail(change.image, cfg), "label": names[change.label],
         "before": names[change.before], "after": names[change.after],
         "is_small": max(change.image.shape[-2:]) <= 64}
        for kind, changes in (("lost", lost), ("won", won))
        for change in changes
    ]  # fmt: skip
