"""Drawings of a page as inline SVG: selectable text, colours by class, a title on each mark.

A drawing with text is 440 units wide, so that the text stays readable on a phone. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

__all__ = ["Mark", "draw_blocks", "draw_line", "draw_scatter"]

_WIDTH, _HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 46
_BLOCKS_IN_A_ROW, _CELL, _GAP = 20, 30, 4
_LINE = 12  # height of a label
_TICK_DISTANCE = 24
_Box = tuple[float, float, float, float]  # left, top, right, bottom


class Mark(NamedTuple):
    """A point of a drawing.

    Attributes:
        x: Horizontal value.
        y: Vertical value.
        title: Description of the point, shown under the pointer.
        kind: Class of the mark, which decides its colour: ``kept`` or ``removed``.
        label: Text beside the point; no text if empty.
    """

    x: float
    y: float
    title: str
    kind: str = "kept"
    label: str = ""


def draw_blocks(blocks: Sequence[dict[str, bool]], name: str) -> Markup:
    """Draw the blocks of a stage as columns with one cell per branch. Cells of kept branches are filled.

    Args:
        blocks: For each block, its slots and whether each branch stayed.
        name: Description of the drawing, for screen readers.
    """
    deepest = max(map(len, blocks))
    row_height = deepest * _CELL + _GAP * 2
    rows = math.ceil(len(blocks) / _BLOCKS_IN_A_ROW)
    cells = []
    for index, block in enumerate(blocks):
        row, column = divmod(index, _BLOCKS_IN_A_ROW)
        x, top = column * _CELL, row * row_height
        y = top + (deepest - len(block)) * _CELL / 2
        for place, (slot, kept) in enumerate(block.items()):
            kind = "kept" if kept else "removed"
            cells.append(
                f'<rect class="{kind}" x="{x + 2}" y="{y + place * _CELL + 2:g}" width="{_CELL - 4}" '
                f'height="{_CELL - 4}" rx="6"><title>{escape(slot)}: {kind}</title></rect>'
            )
    width = min(len(blocks), _BLOCKS_IN_A_ROW) * _CELL
    height = rows * row_height - 2 * _GAP
    return _svg(width, height, name, cells, f' class="blocks" style="width:{width}px"')


def draw_scatter(marks: Sequence[Mark], x_name: str, y_name: str, name: str) -> Markup:
    """Draw points. The vertical axis is linear near zero and logarithmic beyond, so that small values stay apart."""
    sizes = sorted(abs(mark.y) for mark in marks if mark.y)
    linear = max(sizes[len(sizes) // 4], 1e-4) if sizes else 1.0
    heights = [_symlog(mark.y, linear) for mark in marks]
    low, high = min([0.0, *heights]), max([0.0, *heights])
    pad = 0.08 * (high - low) or 1.0
    across = _Scale.of([0.0, *(mark.x for mark in marks)], _LEFT, _WIDTH - _RIGHT, pad=0.1)
    up = _Scale(low - pad, high + pad, _HEIGHT - _BOTTOM, _TOP)
    most = max([linear, *sizes])
    ticks: list[float] = []
    for value in _round_values(linear, most):
        y = up(_symlog(value, linear))
        is_apart = all(abs(up(_symlog(other, linear)) - y) >= _TICK_DISTANCE for other in ticks)
        if is_apart and _TOP <= y <= _HEIGHT - _BOTTOM - 6:
            ticks.append(value)
    parts = _axes(across, x_name, y_name)
    parts += [_tick(up(_symlog(value, linear)), f"{value:g}".replace("-", "−"), value == 0) for value in ticks]
    places = [(across(mark.x), up(height), mark) for mark, height in zip(marks, heights, strict=True)]
    parts += [_circle(x, y, mark) for x, y, mark in places]
    parts += _labels(places)
    return _svg(_WIDTH, _HEIGHT, name, parts)


def draw_line(marks: Sequence[Mark], x_name: str, y_name: str, name: str) -> Markup:
    """Draw points in order, joined by a line. Both axes are linear; the larger x is on the left."""
    across = _Scale.of([mark.x for mark in marks], _WIDTH - _RIGHT, _LEFT, pad=0.05)
    up = _Scale.of([mark.y for mark in marks], _HEIGHT - _BOTTOM, _TOP, pad=0.08)
    points = " ".join(f"{across(mark.x):.1f},{up(mark.y):.1f}" for mark in marks)
    parts = _axes(across, x_name, y_name)
    parts += [_tick(up(value), f"{value:g}".replace("-", "−")) for value in up.ticks()]
    parts.append(f'<polyline class="line" points="{points}"/>')
    parts += [_circle(across(mark.x), up(mark.y), mark) for mark in marks]
    return _svg(_WIDTH, _HEIGHT, name, parts)


class _Scale(NamedTuple):
    """Map values between ``low`` and ``high`` to positions between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, pad: float) -> _Scale:
        low, high = min(values), max(values)
        room = pad * (high - low) or 0.5
        return cls(low - room if low else 0.0, high + room, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values in the range, about ``count`` of them."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw)
        first = math.ceil(self.low / step)
        return [round(number * step, 10) for number in range(first, math.floor(self.high / step) + 1)]


def _symlog(value: float, linear: float) -> float:
    size = abs(value) / linear
    return math.copysign(size if size <= 1 else 1 + math.log10(size), value)


def _round_values(linear: float, most: float) -> list[float]:
    """Round values of both signs up to a size, the roundest first: zero, powers of ten, then 5, 2 and 3 times them."""
    exponents = range(math.floor(math.log10(linear)) - 1, math.floor(math.log10(most)) + 1)
    sizes = [digit * 10.0**exponent for digit in (1, 5, 2, 3) for exponent in reversed(exponents)]
    return [0.0, *(sign * round(size, 12) for size in sizes for sign in (1, -1))]


def _axes(across: _Scale, x_name: str, y_name: str) -> list[str]:
    bottom, middle = _HEIGHT - _BOTTOM, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    parts += [
        f'<text class="tick" x="{across(value):.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>'
        for value in across.ticks()
    ]
    parts.append(f'<text class="name" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
                 f"{escape(x_name)}</text>")  # fmt: skip
    parts.append(f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
                 f"{escape(y_name)}</text>")  # fmt: skip
    return parts


def _tick(y: float, text: str, is_zero: bool = False) -> str:
    kind = "axis" if is_zero else "grid"
    return (
        f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _labels(places: Sequence[tuple[float, float, Mark]]) -> list[str]:
    """Labels beside the points: right, left, above or below, where they cover no point and no other label."""
    parts: list[str] = []
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in places]
    for x, y, mark in places:
        if not mark.label:
            continue
        width = 7.0 * len(mark.label)
        starts = [(x + 8, y - 6), (x - 8 - width, y - 6), (x - width / 2, y - 20), (x - width / 2, y + 8)]
        boxes = [(left, top, left + width, top + _LINE) for left, top in starts]
        box = next((box for box in boxes if _is_free(box, taken)), boxes[0])
        taken.append(box)
        parts.append(f'<text class="label" x="{box[0]:.1f}" y="{box[3] - 2:.1f}">{escape(mark.label)}</text>')
    return parts


def _is_free(box: _Box, taken: Iterable[_Box]) -> bool:
    left, top, right, bottom = box
    is_inside = left >= _LEFT and right <= _WIDTH and top >= 0
    return is_inside and not any(left < r and x < right and top < b and t < bottom for x, t, r, b in taken)


def _circle(x: float, y: float, mark: Mark) -> str:
    kind = "removed" if mark.kind == "removed" else "kept"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(mark.title)}</title></circle>'


def _svg(width: int, height: float, name: str, parts: Iterable[str], more: str = "") -> Markup:
    text = escape(name)
    return Markup(f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{text}"{more}>{"".join(parts)}</svg>')
