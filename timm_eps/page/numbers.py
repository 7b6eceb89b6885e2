"""Number formats of a page."""

from __future__ import annotations

__all__ = ["count", "megabytes", "milliseconds", "percent", "points", "short_count", "signed"]


def count(value: int) -> str:
    """``1234567`` -> ``1,234,567``."""
    return f"{value:,}"


def short_count(value: int) -> str:
    """``1234567`` -> ``1.23 M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return str(value)


def percent(value: float, digits: int = 1) -> str:
    """``0.9876`` -> ``98.8 %``."""
    return f"{100 * value:.{digits}f} %"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, as a real minus. A number that rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", "−")


def points(value: float, digits: int = 1) -> str:
    """A difference of accuracies in percentage points: ``-0.012`` -> ``−1.2 points``."""
    return f"{signed(100 * value, digits)} points"


def milliseconds(value: float) -> str:
    """Three significant digits."""
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def megabytes(value: int) -> str:
    """Bytes in units of a million."""
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"
