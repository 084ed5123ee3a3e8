"""Charts as inline SVG: curves, intervals, a rule's margin. Colours are classes, set by the page's style.

All text that goes into a chart is escaped by `Markup.format`; no chart needs a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline_lib.evaluation.report.wording import given, number
from pipeline_lib.schema import Interval, RuleResult

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 34
_MOST_POINTS = 240
_MOST_MARKS = 40
SMOOTHED_FROM = 25
"""Curves of fewer points are drawn as they are."""


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, pad_frac: float = 0.06) -> Axis:
        """Cover the values with a margin; a single value gets room on both sides."""
        low, high = min(values), max(values)
        pad = (high - low) * pad_frac or abs(high) * 0.1 or 1.0
        return cls(low - pad, high + pad, start, end)

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, most: int = 4) -> list[float]:
        """Return round values inside the scale, at most `most` + 1."""
        raw = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def line_chart(points: Sequence[Point], *, title: str, x_label: str, is_noisy: bool = True) -> Markup:
    """Draw one curve over steps: every value faint, a running mean strong where there are many.

    Args:
        points: (step, value), finite, in order of step; at least one.
        title: What the values are, for readers who do not see the drawing.
        x_label: What is counted along the axis.
        is_noisy: False for a curve that is set and not measured, e.g. the learning rate.

    Returns:
        The chart; empty where there is no point.
    """
    if not points:
        return Markup("")
    shown = thinned(points)
    x_axis = Axis.over([x for x, _ in shown], LEFT, WIDTH - RIGHT, pad_frac=0.0001)
    if len(shown) == 1:
        x_axis = Axis(shown[0][0] - 1, shown[0][0] + 1, LEFT, WIDTH - RIGHT)
    y_axis = Axis.over([y for _, y in shown], HEIGHT - BOTTOM, TOP)
    parts = [grid(x_axis, y_axis, x_label)]
    is_smoothed = is_noisy and len(shown) >= SMOOTHED_FROM
    parts.append(polyline(shown, x_axis, y_axis, "raw" if is_smoothed else "line"))
    if is_smoothed:
        shown = running_mean(shown)
        parts.append(polyline(shown, x_axis, y_axis, "line"))
    parts.append(_marks(shown, x_axis, y_axis, x_label, with_dots=len(shown) <= _MOST_MARKS))
    last_x, last_y = shown[-1]
    parts.append(Markup('<circle class="end" cx="{}" cy="{}" r="3.5"/>').format(x_axis(last_x), y_axis(last_y)))
    return svg(WIDTH, HEIGHT, title, parts)


def interval_chart(rows: Sequence[tuple[str, Interval]], *, title: str, baseline: float | None) -> Markup:
    """Draw one estimate with its interval per model, and a dashed line at a value to compare with.

    Args:
        rows: (model, interval); what could not be estimated gets a row with `–`.
        title: What is drawn, for readers who do not see the drawing.
        baseline: Value of the dashed line, or None.
    """
    ends = [
        value
        for _, interval in rows
        for value in (interval.low, interval.value, interval.high, baseline)
        if value is not None
    ]
    if not ends:
        return Markup("")
    row_px, top, left, right = 26, 8, 84, 60
    bottom = top + row_px * len(rows)
    axis = Axis.over(ends, left, WIDTH - right)
    parts = []
    for tick in axis.ticks():
        parts.append(
            Markup('<line class="grid" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/><text x="{x}" y="{c}" '
                   'class="tick mid">{text}</text>')
            .format(x=axis(tick), a=top, b=bottom, c=bottom + 16, text=given(tick))
        )  # fmt: skip
    if baseline is not None:
        parts.append(
            Markup('<line class="baseline" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/>')
            .format(x=axis(baseline), a=top, b=bottom)
        )  # fmt: skip
    for place, (name, interval) in enumerate(rows):
        parts.append(_interval_row(name, interval, axis, top + row_px * place + row_px / 2))
    return svg(WIDTH, bottom + 24, title, parts)


def rule_chart(rule: RuleResult) -> Markup:
    """Draw a rule's estimate and interval against its threshold, small enough for a table cell."""
    estimate = rule.estimate
    known = [value for value in (estimate.low, estimate.value, estimate.high) if value is not None]
    if not known:
        return Markup("")
    width, height, middle = 150, 26, 13
    axis = Axis.over([*known, rule.threshold], 6, width - 6)
    parts = [
        Markup('<line class="grid" x1="0" x2="{}" y1="{y}" y2="{y}"/>').format(width, y=middle),
        Markup('<line class="threshold" x1="{x}" x2="{x}" y1="2" y2="{b}"/>')
        .format(x=axis(rule.threshold), b=height - 2),
        _whisker(estimate, axis, middle, f"s-{rule.status}"),
    ]  # fmt: skip
    title = f"{rule.metric}: estimate {number(estimate.value)}, threshold {number(rule.threshold)}"
    return svg(width, height, title, parts, css="chart mini")


def _interval_row(name: str, interval: Interval, axis: Axis, y: float) -> Markup:
    label = Markup('<text class="label" x="0" y="{}">{}</text>').format(y + 4, name)
    value = Markup('<text class="value end-text" x="{}" y="{}">{}</text>').format(WIDTH, y + 4, number(interval.value))
    return label + _whisker(interval, axis, y, model_class(name)) + value


def _whisker(interval: Interval, axis: Axis, y: float, css: str) -> Markup:
    drawn = Markup("")
    if interval.low is not None and interval.high is not None:
        drawn += Markup('<line class="whisker" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(
            axis(interval.low), axis(interval.high), y=y
        )
    if interval.value is not None:
        drawn += Markup('<circle class="dot" cx="{}" cy="{}" r="4.5"/>').format(axis(interval.value), y)
    return Markup('<g class="{}">{}</g>').format(css, drawn)


def model_class(name: str) -> str:
    """Return the style class of a model of the run; unknown names share one colour."""
    return f"m-{name}" if name in ("base", "sft", "dpo", "ppo", "champion") else "m-other"


def grid(
    x_axis: Axis, y_axis: Axis, x_label: str, *, counts: bool = True, width: int = WIDTH, height: int = HEIGHT
) -> Markup:
    """Draw lines at round values, their numbers, and what the x axis counts.

    Args:
        x_axis: From left to right.
        y_axis: From bottom to top.
        x_label: Words below the right end.
        counts: True where x counts something, so that only whole numbers are written.
        width: Of the whole chart, pixels.
        height: Of the whole chart, pixels.
    """
    parts = []
    for tick in y_axis.ticks():
        parts.append(
            Markup('<line class="grid" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/><text class="tick end-text" '
                   'x="{c}" y="{d}">{text}</text>')
            .format(a=LEFT, b=width - RIGHT, y=y_axis(tick), c=LEFT - 6, d=y_axis(tick) + 4, text=given(tick))
        )  # fmt: skip
    for tick in x_axis.ticks():
        if not counts or tick == int(tick):
            parts.append(
                Markup('<text class="tick mid" x="{}" y="{}">{}</text>')
                .format(x_axis(tick), height - BOTTOM + 15, given(tick))
            )  # fmt: skip
    parts.append(
        Markup('<text class="tick end-text" x="{}" y="{}">{}</text>')
        .format(width - RIGHT, height - 4, x_label)
    )  # fmt: skip
    return Markup("").join(parts)


def polyline(points: Sequence[Point], x_axis: Axis, y_axis: Axis, css: str) -> Markup:
    """Draw points joined in their order."""
    places = " ".join(f"{x_axis(x)},{y_axis(y)}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(css, places)


def _marks(points: Sequence[Point], x_axis: Axis, y_axis: Axis, x_label: str, *, with_dots: bool) -> Markup:
    """Place dots that tell their value to a pointer."""
    every = math.ceil(len(points) / _MOST_MARKS)
    return Markup("").join(
        Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{} {}: {}</title></circle>').format(
            "point" if with_dots else "touch", x_axis(x), y_axis(y), 2 if with_dots else 6, x_label,
            given(x), number(y),
        )
        for x, y in points[::every]
    )  # fmt: skip


def thinned(points: Sequence[Point]) -> list[Point]:
    """Average neighbours so that a long run stays a small drawing; the last step keeps its place."""
    every = math.ceil(len(points) / _MOST_POINTS)
    if every == 1:
        return list(points)
    groups = [points[first : first + every] for first in range(0, len(points), every)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Return the mean over a window of a twelfth of the curve, centred, cut at both ends."""
    reach = max(1, len(points) // 24)
    means = []
    for place, (x, _) in enumerate(points):
        around = points[max(0, place - reach) : place + reach + 1]
        means.append((x, sum(y for _, y in around) / len(around)))
    return means


def svg(width: float, height: float, title: str, parts: Sequence[Markup], css: str = "chart") -> Markup:
    """Put a drawing together; its title is for readers who do not see it."""
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        css, width, height, title, Markup("").join(parts)
    )
