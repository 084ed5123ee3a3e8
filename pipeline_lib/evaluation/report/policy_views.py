"""What the page says of trainings on own samples, and of all models on the plane of reward and KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from pipeline_lib.evaluation.report.charts import line_chart
from pipeline_lib.evaluation.report.comparison import ComparisonRow
from pipeline_lib.evaluation.report.policy_charts import MOST_LINES, frontier_chart, lines_chart, path_chart
from pipeline_lib.evaluation.report.policy_runs import PolicyRun, PolicySample
from pipeline_lib.evaluation.report.series import Series
from pipeline_lib.evaluation.report.wording import plain

_TITLES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO"}
_SHOWN_SAMPLES = 3
"""Samples of an iteration that stand open; the others are one click away."""
_COMPARED = "Proxy and held-out reward"
"""The chart that says nothing with one line."""
_LINES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Score", "what is trained for", (("score", "as given"), ("shaped_score", "with the end rule"))),
    (
        _COMPARED, "apart where the policy has learned the proxy's faults",
        (("score", "trained against"), ("heldout_score", "only measured")),
    ),
    (
        "KL from the reference", "nats a response, by every estimator",
        (("ref_kl_nats", "k1"), ("ref_kl_k2_nats", "k2"), ("ref_kl_k3_nats", "k3"), ("ref_kl_full_nats", "full")),
    ),
    ("Distinct pieces", "share of all", (("distinct_1_frac", "words"), ("distinct_2_frac", "pairs"))),
)  # fmt: skip
"""Charts of several figures: title, note, and the figures with their names."""
_SINGLE = (
    ("kl_coef", "KL coefficient", ""),
    ("response_tokens", "Response length", "tokens"),
    ("finished_frac", "Ended by itself", "share of responses"),
    ("entropy_nats", "Entropy", "nats a token"),
    ("score_per_token", "Slope of the score over the length", "score a token"),
    ("alike_frac", "Groups whose samples all score the same", "share of prompts"),
)
_SET_FIGURES = ("kl_coef",)
_WEIGHTED = ("reward/", "_weighted")


@dataclass(frozen=True)
class Drawing:
    """One chart with its words."""

    title: str
    note: str
    drawing: Markup
    legend: tuple[str, ...] = ()
    """Names of the lines in the order of their colours; none where there is one line."""


@dataclass(frozen=True)
class SampledIteration:
    """Kept samples of one iteration."""

    iteration: int
    shown: tuple[PolicySample, ...]
    more: tuple[PolicySample, ...]


@dataclass(frozen=True)
class PolicyView:
    """One training on own samples."""

    title: str
    ref: str
    charts: tuple[Drawing, ...]
    samples: tuple[SampledIteration, ...]
    breaches: tuple[str, ...]
    outcome: str
    """What the breaches led to, in a sentence; empty without any."""


def policy_view(run: PolicyRun) -> PolicyView:
    """Draw one training.

    Args:
        run: As it was gathered.
    """
    by_iteration = [
        (iteration, tuple(rows)) for iteration, rows in groupby(run.samples, key=lambda sample: sample.iteration)
    ]
    return PolicyView(
        policy_title(run), str(run.ref), tuple(_charts(run.series)),
        tuple(
            SampledIteration(iteration, rows[:_SHOWN_SAMPLES], rows[_SHOWN_SAMPLES:])
            for iteration, rows in by_iteration
        ),
        run.breaches, _outcome(run),
    )  # fmt: skip


def policy_title(run: PolicyRun) -> str:
    """Return the method, with the candidate's name where that is another word."""
    names = [name for name in run.names if name not in (run.stage, "champion")]
    title = _TITLES[run.stage]
    return f"{title} ({', '.join(names)})" if names else title


def frontier(comparison: Sequence[ComparisonRow]) -> Markup:
    """Draw the models' held-out reward over their KL; the base model, which no training limits, is left out.

    Returns:
        The chart; empty where fewer than two models have both figures.
    """
    by_metric = {row.metric: row.intervals for row in comparison}
    kl, score = by_metric.get("kl", {}), by_metric.get("score", {})
    rows = [(name, kl[name], score[name]) for name in kl if name in score and name != "base"]
    known = [row for row in rows if row[1].value is not None and row[2].value is not None]
    if len(known) < 2:
        return Markup("")
    return frontier_chart(
        known, title="Held-out reward over KL of every model", x_label="KL from the SFT model, nats a response"
    )


def _charts(series: Series) -> list[Drawing]:
    found = []
    if series.get("ref_kl_nats") and series.get("score"):
        found.append(_reward_against_kl(series))
    for title, note, figures in _LINES:
        lines = _different([(name, series.get(figure, [])) for figure, name in figures])
        if lines and (len(lines) > 1 or title != _COMPARED):
            found.append(_lines(title, note, lines))
    parts = [(figure, points) for figure, points in series.items() if _is_weighted(figure)]
    if len(parts) > 1:
        lines = [(_label(figure), points) for figure, points in parts[:MOST_LINES]]
        found.append(_lines("Parts of the score", "each with its weight", lines))
    for figure, title, note in _SINGLE:
        if series.get(figure):
            drawing = line_chart(
                series[figure], title=f"{title}, over iterations ({plain(figure)})", x_label="iteration",
                is_noisy=figure not in _SET_FIGURES,
            )  # fmt: skip
            found.append(Drawing(title, note, drawing))
    return found


def _reward_against_kl(series: Series) -> Drawing:
    kl = dict(series["ref_kl_nats"])
    points = [(int(at), kl[at], score) for at, score in series["score"] if at in kl]
    drawing = path_chart(
        points, title="Score over KL from the reference, by iteration", x_label="KL from the reference, nats a response"
    )
    return Drawing("Reward against KL", f"from iteration {points[0][0]} to {points[-1][0]}", drawing)


def _lines(title: str, note: str, lines: list[tuple[str, list[tuple[float, float]]]]) -> Drawing:
    drawing = lines_chart(lines, title=f"{title}, over iterations", x_label="iteration")
    return Drawing(title, note, drawing, tuple(name for name, _ in lines) if len(lines) > 1 else ())


def _different(
    lines: list[tuple[str, list[tuple[float, float]]]],
) -> list[tuple[str, list[tuple[float, float]]]]:
    """Leave out what is not there, and what is the first line once more."""
    first = lines[0][1]
    return [line for place, line in enumerate(lines) if line[1] and (place == 0 or line[1] != first)]


def _is_weighted(figure: str) -> bool:
    return figure.startswith(_WEIGHTED[0]) and figure.endswith(_WEIGHTED[1])


def _label(figure: str) -> str:
    return figure.removeprefix(_WEIGHTED[0]).removesuffix(_WEIGHTED[1])


def _outcome(run: PolicyRun) -> str:
    if not run.breaches:
        return ""
    if len(run.breaches) == 1:
        return "The weights went back to the last iteration within the limits, and the learning rate was halved."
    return f"The training ended there; the result is the best state, before iteration {run.best_iteration}."
