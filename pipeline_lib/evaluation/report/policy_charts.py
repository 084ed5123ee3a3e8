"""Charts of trainings on own samples: several figures over iterations, reward against KL, the frontier of models."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from pipeline_lib.evaluation.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SMOOTHED_FROM,
    TOP,
    WIDTH,
    Axis,
    Point,
    grid,
    model_class,
    polyline,
    running_mean,
    svg,
    thinned,
)
from pipeline_lib.evaluation.report.wording import number
from pipeline_lib.schema import Interval

MOST_LINES = 4
"""Lines of one chart, each with a colour of its own: classes `c-1` to `c-4`."""
_TALL = 300
_WIDE = 640
_LABEL_PX = 13
_LABEL_REACH_PX = 90
"""How near two dots must be for their labels to stand in each other's way."""
_MOST_PATH_DOTS = 60


def lines_chart(lines: Sequence[tuple[str, Sequence[Point]]], *, title: str, x_label: str) -> Markup:
    """Draw several figures of one unit over the same axis, a running mean where there are many points.

    Args:
        lines: (name, points) each, at most `MOST_LINES`; the points as for `line_chart`.
        title: What the values are, for readers who do not see the drawing.
        x_label: What is counted along the axis.

    Returns:
        The chart; empty where there is no point.
    """
    drawn = [(name, thinned(points)) for name, points in lines if points]
    if not drawn:
        return Markup("")
    assert len(drawn) <= MOST_LINES, "there are no more colours"
    steps = [x for _, points in drawn for x, _ in points]
    x_axis = Axis.over(steps, LEFT, WIDTH - RIGHT, pad_frac=0.0001)
    if len(set(steps)) == 1:
        x_axis = Axis(steps[0] - 1, steps[0] + 1, LEFT, WIDTH - RIGHT)
    y_axis = Axis.over([y for _, points in drawn for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [grid(x_axis, y_axis, x_label)]
    for place, (name, points) in enumerate(drawn, start=1):
        strong = running_mean(points) if len(points) >= SMOOTHED_FROM else points
        inside = [polyline(strong, x_axis, y_axis, "own")]
        x, y = strong[-1]
        inside.append(
            Markup('<circle class="dot" cx="{}" cy="{}" r="3.5"><title>{}: {} at {} {}</title></circle>')
            .format(x_axis(x), y_axis(y), name, number(y), x_label, number(x))
        )  # fmt: skip
        parts.append(Markup('<g class="c-{}">{}</g>').format(place, Markup("").join(inside)))
    return svg(WIDTH, HEIGHT, title, parts)


def path_chart(points: Sequence[tuple[int, float, float]], *, title: str, x_label: str) -> Markup:
    """Draw how a training moved in the plane of two figures, its first and last iteration named.

    Args:
        points: (iteration, x, y), finite, in order of the iteration.
        title: What is drawn, for readers who do not see the drawing.
        x_label: What the x axis measures.

    Returns:
        The chart; empty where there is no point.
    """
    if not points:
        return Markup("")
    x_axis = Axis.over([x for _, x, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = Axis.over([y for _, _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [grid(x_axis, y_axis, x_label, counts=False)]
    is_smoothed = len(points) >= SMOOTHED_FROM
    places = [(x, y) for _, x, y in points]
    parts.append(polyline(places, x_axis, y_axis, "raw" if is_smoothed else "line"))
    if is_smoothed:
        over = [running_mean([(float(at), row[axis]) for at, row in enumerate(points)]) for axis in (1, 2)]
        means = [(x, y) for (_, x), (_, y) in zip(*over, strict=True)]
        parts.append(polyline(means, x_axis, y_axis, "line"))
    every = -(-len(points) // _MOST_PATH_DOTS)
    for iteration, x, y in [*points[:-1][::every], points[-1]]:
        parts.append(
            Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>iteration {}: {} at {}</title></circle>')
            .format("touch" if is_smoothed else "point", x_axis(x), y_axis(y), 6 if is_smoothed else 2, iteration,
                    number(y), number(x))
        )  # fmt: skip
    for iteration, x, y in dict.fromkeys((points[0], points[-1])):
        parts.append(
            Markup('<circle class="end" cx="{}" cy="{}" r="3.5"/><text class="label" x="{}" y="{}">{}</text>')
            .format(x_axis(x), y_axis(y), x_axis(x) + 6, y_axis(y) - 6, iteration)
        )  # fmt: skip
    return svg(WIDTH, HEIGHT, title, parts)


def frontier_chart(rows: Sequence[tuple[str, Interval, Interval]], *, title: str, x_label: str) -> Markup:
    """Draw every model where its two figures are, with both intervals and its name.

    Args:
        rows: (model, figure along x, figure along y); models without both are left out.
        title: What is drawn, for readers who do not see the drawing.
        x_label: What the x axis measures.

    Returns:
        The chart; empty where no model has both figures.
    """
    known = [(name, x, y) for name, x, y in rows if x.value is not None and y.value is not None]
    if not known:
        return Markup("")
    x_axis = Axis.over([end for _, x, _ in known for end in _ends(x)], LEFT, _WIDE - RIGHT - _LABEL_REACH_PX)
    y_axis = Axis.over([end for _, _, y in known for end in _ends(y)], _TALL - BOTTOM, TOP)
    parts = [grid(x_axis, y_axis, x_label, counts=False, width=_WIDE, height=_TALL)]
    dots = [(name, x_axis(x.value or 0.0), y_axis(y.value or 0.0), x, y) for name, x, y in known]
    labels: list[Markup] = []
    heights = _apart([(x_px, y_px) for _, x_px, y_px, _, _ in dots])
    for (name, x_px, y_px, x, y), label_y in zip(dots, heights, strict=True):
        title_of = Markup("<title>{}: {} at {}</title>").format(name, number(y.value), number(x.value))
        parts.append(
            Markup('<g class="{}">{}{}<circle class="dot" cx="{}" cy="{}" r="5">{}</circle></g>')
            .format(model_class(name), _bar(x, x_axis, y_px, is_level=True), _bar(y, y_axis, x_px, is_level=False),
                    x_px, y_px, title_of)
        )  # fmt: skip
        labels.append(
            Markup('<text class="label" x="{}" y="{}">{}</text>').format(x_px + 9, round(label_y + 4, 1), name)
        )  # fmt: skip
    parts += labels  # no dot covers a name
    return svg(_WIDE, _TALL, title, parts)


def _bar(interval: Interval, axis: Axis, across_px: float, *, is_level: bool) -> Markup:
    """Draw an interval through a dot, level or upright."""
    if interval.low is None or interval.high is None:
        return Markup("")
    low, high = axis(interval.low), axis(interval.high)
    ends = (low, high, across_px, across_px) if is_level else (across_px, across_px, low, high)
    return Markup('<line class="whisker thin" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(*ends)


def _ends(interval: Interval) -> list[float]:
    return [value for value in (interval.low, interval.value, interval.high) if value is not None]


def _apart(dots: Sequence[tuple[float, float]]) -> list[float]:
    """Return a height for each dot's label such that labels of near dots do not overlap."""
    heights: dict[int, float] = {}
    for place in sorted(range(len(dots)), key=lambda at: dots[at][1]):
        x, y = dots[place]
        taken = sorted(height for other, height in heights.items() if abs(dots[other][0] - x) < _LABEL_REACH_PX)
        for height in taken:
            if abs(height - y) < _LABEL_PX:
                y = height + _LABEL_PX
        heights[place] = y
    return [heights[place] for place in range(len(dots))]
