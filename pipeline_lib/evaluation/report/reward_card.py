"""The reward model's report card as drawings and rows: calibration, accuracy by margin and strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline_lib.evaluation.report.charts import interval_chart
from pipeline_lib.evaluation.report.wording import bounds, count, number, percent
from pipeline_lib.evaluation.report_card import AccuracyBucket, ReliabilityBin, ReportCard, ScoreDistribution

_SIZE, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 46, 14, 14, 34
_HEIGHT = 250
_SMALLEST_DOT, _LARGEST_DOT = 3.0, 11.0


@dataclass(frozen=True)
class BucketRow:
    """One line of the table."""

    group: str
    name: str
    pairs: str
    accuracy: str
    interval: str


@dataclass(frozen=True)
class Drawing:
    """One chart with its caption."""

    title: str
    note: str
    drawing: Markup


@dataclass(frozen=True)
class CardView:
    """What the section shows below its tiles."""

    drawings: tuple[Drawing, ...]
    rows: tuple[BucketRow, ...]
    scores: str


def card_view(card: ReportCard) -> CardView:
    """Draw a report card.

    Args:
        card: As the reward stage wrote it.
    """
    groups = (
        ("Accuracy by margin", "the difference of the two scores, a quarter of the pairs each", card.by_margin),
        ("Accuracy by strength", "how much better people found the better one", card.by_strength),
        ("Accuracy by distance in rank", "places between the two responses", card.by_rank_gap),
    )
    drawings = [
        Drawing(
            "Calibration", "share of pairs in which the predicted winner is the better one; the dashed line is ideal",
            reliability_chart(card.reliability),
        )
    ]  # fmt: skip
    for title, note, buckets in groups:
        if buckets:
            estimates = [(bucket.name, bucket.accuracy_frac) for bucket in buckets]
            drawings.append(Drawing(title, note, interval_chart(estimates, title=title, baseline=0.5)))
    rows = [row for title, _, buckets in groups for row in _rows(title, buckets)]
    return CardView(tuple(drawings), tuple(rows), _in_words(card.scores))


def reliability_chart(bins: Sequence[ReliabilityBin]) -> Markup:
    """Draw accuracy over confidence, a dot a bin, its area the share of the pairs.

    Args:
        bins: From low to high confidence; empty ones are left out.
    """
    filled = [place for place in bins if place.num_pairs]
    if not filled:
        return Markup("")
    most = max(place.num_pairs for place in filled)
    parts = [_frame()]
    for place in filled:
        assert place.confidence_frac is not None
        assert place.accuracy_frac is not None
        radius = max(_SMALLEST_DOT, _LARGEST_DOT * (place.num_pairs / most) ** 0.5)
        parts.append(
            Markup('<circle class="dot m-other" cx="{}" cy="{}" r="{:.1f}">'
                   '<title>{} sure, {} right, {} pairs</title></circle>')
            .format(_x(place.confidence_frac), _y(place.accuracy_frac), radius, percent(place.confidence_frac),
                    percent(place.accuracy_frac), count(place.num_pairs))
        )  # fmt: skip
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="Accuracy over confidence, by bin">{}</svg>'
    ).format(_SIZE, _HEIGHT, Markup("").join(parts))


def _frame() -> Markup:
    """Draw the grid, the axes' words, and the line on which confidence is accuracy."""
    parts = [
        Markup('<line class="grid" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>'
               '<text class="tick end-text" x="{c}" y="{d}">{text}</text>')
        .format(a=_LEFT, b=_SIZE - _RIGHT, y=_y(share), c=_LEFT - 6, d=_y(share) + 4, text=percent(share))
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]  # fmt: skip
    parts += [
        Markup('<text class="tick mid" x="{}" y="{}">{}</text>')
        .format(_x(share), _HEIGHT - _BOTTOM + 15, percent(share))
        for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    ]  # fmt: skip
    parts.append(
        Markup('<line class="baseline" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(_x(0.5), _y(0.5), _x(1.0), _y(1.0))
    )
    parts.append(
        Markup('<text class="tick end-text" x="{}" y="{}">confidence</text>').format(_SIZE - _RIGHT, _HEIGHT - 4)
    )
    return Markup("").join(parts)


def _x(confidence_frac: float) -> float:
    return round(_LEFT + (confidence_frac - 0.5) / 0.5 * (_SIZE - _RIGHT - _LEFT), 1)


def _y(accuracy_frac: float) -> float:
    return round(_HEIGHT - _BOTTOM - accuracy_frac * (_HEIGHT - _BOTTOM - _TOP), 1)


def _rows(group: str, buckets: Sequence[AccuracyBucket]) -> list[BucketRow]:
    return [
        BucketRow(
            group if place == 0 else "", bucket.name, count(bucket.num_pairs), percent(bucket.accuracy_frac.value),
            bounds(bucket.accuracy_frac),
        )
        for place, bucket in enumerate(buckets)
    ]  # fmt: skip


def _in_words(scores: ScoreDistribution) -> str:
    shares = list(scores.quantiles)
    low, high = shares[0], shares[-1]
    return (
        f"Raw scores: mean {number(scores.mean)}, standard deviation {number(scores.std)}, "
        f"{percent(float(low))} below {number(scores.quantiles[low])}, "
        f"{percent(1 - float(high))} above {number(scores.quantiles[high])}; "
        f"better responses {number(scores.better_mean)}, worse ones {number(scores.worse_mean)} on average."
    )
