"""Counts over many cases: a table to print, a tree to write, and whether the fuzzer found anything."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from .runner import Case

# Of what the package refuses itself, so much must be one short line that names a field or a file.
GOOD_MESSAGES = 0.99
_EXAMPLES = 20
_OUTCOMES = ("loaded", "refused", "failed", "stopped")


class Summary:
    """Takes cases one by one."""

    def __init__(self) -> None:
        self.cases = self.loads = 0
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.faults: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.faulty_cases: set[int] = set()
        self.good_messages = self.refusals = 0
        self.elsewhere: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.place_cases: dict[str, int] = {}
        self.slowest = self.largest = (0.0, -1, "")

    def add(self, case: Case) -> None:
        """Count a case."""
        self.cases += 1
        for result in case.results:
            self.loads += 1
            self.outcomes[result.loader][result.outcome] += 1
            self.slowest = max(self.slowest, (result.seconds, case.number, result.loader))
            self.largest = max(self.largest, (result.megabytes, case.number, result.loader))
            if result.outcome == "refused":
                self.refusals += 1
                self.good_messages += result.good_message
            elif result.outcome == "failed":
                self.elsewhere[result.library] += 1
                place = f"{result.place} {result.message.partition(':')[0]}"
                self.places[place] += 1
                self.place_cases.setdefault(place, case.number)
        for loader, kind, sentence in case.faults:
            self.counts[kind] += 1
            # Messages count by their share, see is_clean.
            if kind != "message":
                self.faulty_cases.add(case.number)
            self.faults[kind].append(
                {"case": case.number, "loader": loader, "fault": sentence, "base": case.base, "changes": case.notes}
            )

    @property
    def share_of_good_messages(self) -> float:
        return self.good_messages / self.refusals if self.refusals else 1.0

    def is_clean(self) -> bool:
        """Whether there is no fault, and enough of the messages are good."""
        return not self.faulty_cases and self.share_of_good_messages >= GOOD_MESSAGES

    def text(self) -> str:
        """The report to print."""
        names = sorted(self.outcomes)
        lines = [
            f"{self.cases} cases, {self.loads} loads",
            "",
            f"{'loader':<24}" + "".join(f"{o:>9}" for o in _OUTCOMES),
        ]
        for name in [*names, "all"]:
            counted = self.outcomes[name] if name != "all" else sum((self.outcomes[n] for n in names), Counter())
            lines.append(f"{name:<24}" + "".join(f"{counted[outcome]:>9}" for outcome in _OUTCOMES))
        lines += [
            "(refused: the last frame is in this package; failed: it is in a library; stopped: by the fuzzer)",
            "",
            f"Good messages among the package's own refusals: {self.good_messages} of {self.refusals}, "
            f"{100 * self.share_of_good_messages:.2f} % (at least {100 * GOOD_MESSAGES:.0f} % wanted)",
            f"Longest load: {self.slowest[0]:.2f} s of processor time (case {self.slowest[1]}, {self.slowest[2]})",
            f"Largest peak: {self.largest[0]:.0f} MB above the process (case {self.largest[1]}, {self.largest[2]})",
            "",
            "Errors of libraries: " + (", ".join(f"{k} {n}" for k, n in self.elsewhere.most_common()) or "none"),
        ]
        lines += [
            f"  {count:>6}  {place} (case {self.place_cases[place]})" for place, count in self.places.most_common(15)
        ]
        lines += ["", f"Faults: {sum(self.counts.values())} in {len(self.faulty_cases)} cases (without messages)"]
        for kind, count in self.counts.most_common():
            first = list(dict.fromkeys(fault["case"] for fault in self.faults[kind]))[:6]
            lines.append(f"  {count:>6}  {kind}: cases {', '.join(map(str, first))}")
            for fault in self._examples(kind):
                lines.append(
                    f"            {fault['case']} {fault['base']} by {fault['loader']}: {fault['fault'][:220]!r}"
                )
                lines.append(f"                after {'; '.join(fault['changes'])[:220]}")
        return "\n".join(lines)

    def _examples(self, kind: str, count: int = 3) -> list[dict[str, Any]]:
        """Faults of a kind that read differently."""
        different = {fault["fault"][:60]: fault for fault in reversed(self.faults[kind])}
        return sorted(different.values(), key=lambda fault: fault["case"])[:count]

    def tree(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "cases": self.cases,
            "loads": self.loads,
            "outcomes": {name: dict(counted) for name, counted in sorted(self.outcomes.items())},
            "refusals": self.refusals,
            "good_messages": self.good_messages,
            "share_of_good_messages": round(self.share_of_good_messages, 4),
            "slowest": {"seconds": round(self.slowest[0], 3), "case": self.slowest[1], "loader": self.slowest[2]},
            "largest": {"megabytes": round(self.largest[0]), "case": self.largest[1], "loader": self.largest[2]},
            "errors_of_libraries": dict(self.elsewhere.most_common()),
            "places": {place: [count, self.place_cases[place]] for place, count in self.places.most_common(100)},
            "fault_counts": dict(self.counts.most_common()),
            "faulty_cases": len(self.faulty_cases),
            "faults": {kind: self._examples(kind, _EXAMPLES) for kind in self.faults},
            "clean": self.is_clean(),
        }
