"""Render the page: the jinja environment, its filters, and the context of the templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline_lib.evaluation.report import views, wording
from pipeline_lib.evaluation.report.charts import model_class, rule_chart
from pipeline_lib.evaluation.report.comparison import accuracy_interval, compare
from pipeline_lib.evaluation.report.gather import ReportData, RewardCard, gather
from pipeline_lib.evaluation.report.graph import lineage_chart
from pipeline_lib.evaluation.report.policy_views import frontier, policy_view
from pipeline_lib.evaluation.report.reward_card import card_view
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.schema import ArtifactRef, FunnelStep, Rejection

if TYPE_CHECKING:
    from pipeline_lib.storage.store import ArtifactStore

_SECTIONS = {
    "verdict": "Verdict", "rows": "Rows", "training": "Training", "rollouts": "Own samples", "labels": "Labels",
    "candidates": "Side by side", "reward-model": "Reward models", "prompts": "Answers", "lineage": "Lineage",
}  # fmt: skip
_EXCERPT_CHARACTERS = 200


def build_report(
    store: ArtifactStore,
    *,
    verdict: ArtifactRef,
    dataset: ArtifactRef,
    name: str,
    sampled_prompts: int,
    promotes: bool = True,
    reward_models: Mapping[str, ArtifactRef] | None = None,
) -> str:
    """Build the report of a run as one HTML page that needs no other file and no network.

    The page is a function of the artifacts alone: equal artifacts give equal bytes.

    Args:
        store: Where the artifacts are.
        verdict: The gate's artifact; everything else is found from its inputs.
        dataset: The dataset that the run's stages used.
        name: The run's name.
        sampled_prompts: Held-out prompts to show with all answers.
        promotes: Whether the run promotes its winner.
        reward_models: The run's further reward models by name.

    Returns:
        The page. All text out of artifacts is escaped.

    Raises:
        PipelineError: An artifact cannot be read.
    """
    data = gather(
        store, verdict=verdict, dataset=dataset, reward_models=reward_models or {}, name=name,
        sampled_prompts=sampled_prompts, promotes=promotes,
    )  # fmt: skip
    template = _environment().get_template("page.html")
    return template.render(_context(data, verdict)) + "\n"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline_lib.evaluation.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": wording.number, "given": wording.given, "count": wording.count,
        "percent": wording.percent, "bounds": wording.bounds,
        "duration": wording.duration, "size": wording.size, "model_class": model_class,
        "rule_chart": rule_chart, "lineage_chart": lineage_chart, "funnel_bar": _funnel_bar,
        "share_bar": _share_bar, "place": _place, "row_excerpt": _row_excerpt,
    }  # fmt: skip
    return environment


def _context(data: ReportData, verdict: ArtifactRef) -> dict[str, Any]:
    bootstrap = Bootstrap.model_validate(data.verdict.policy.get("bootstrap", {}))
    comparison = compare(data.examples, bootstrap)
    curves = views.stage_curves(data)
    measured = [node.manifest.measurements for node in data.lineage.own]
    rules = [rule for candidate in data.verdict.candidates for rule in candidate.rules]
    shown = {
        "rows": bool(data.funnels or data.splits), "training": bool(curves), "rollouts": bool(data.policy_runs),
        "labels": bool(data.labelled_rounds), "candidates": bool(comparison), "reward-model": bool(data.cards),
        "prompts": bool(data.prompts),
    }  # fmt: skip
    return {
        "data": data,
        "created_at": _minute(data.lineage[verdict].manifest.created_at),
        "verdict_ref": verdict,
        "contents": [(anchor, title) for anchor, title in _SECTIONS.items() if shown.get(anchor, True)],
        "decision": views.decision(data.verdict, promotes=data.promotes),
        "tiles": views.verdict_tiles(data.verdict, comparison),
        "candidates": views.candidate_views(data.verdict),
        "selected_by": views.selected_by(data.verdict),
        "confidence": rules[0].estimate.confidence_frac if rules else None,
        "compared_confidence": bootstrap.confidence_frac,
        "policy": views.as_yaml(data.verdict.policy),
        "split_kinds": [
            kind
            for kind in ("demonstration", "comparison", "prompt")
            if any(kind in split.kinds for split in data.splits)
        ],
        "rows_in_splits": sum(split.rows for split in data.splits),
        "curves": curves,
        "policy_views": [policy_view(run) for run in data.policy_runs],
        "comparison": comparison,
        "frontier": frontier(comparison),
        "models": list(data.examples),
        "num_prompts": min((len(rows) for rows in data.examples.values()), default=0),
        "cards": [_card(card, bootstrap) for card in data.cards],
        "total_wall_s": sum(values.get("wall_s", 0.0) for values in measured),
        "highest_rss_bytes": max((values.get("peak_rss_bytes", 0.0) for values in measured), default=None),
        "configurations": views.configurations(data.lineage),
        "versions": views.versions(data.lineage),
        "none_mark": wording.NONE,
    }


def _card(card: RewardCard, bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "name": card.name,
        "tiles": views.reward_model_tiles(card.figures, accuracy_interval(card.figures, bootstrap)),
        "view": card_view(card.tables) if card.tables is not None else None,
    }


def _funnel_bar(step: FunnelStep, rows_in: int) -> Markup:
    """Draw the rows kept and rejected by a step as shares of all rows that came in."""
    total = max(1, rows_in)
    return Markup(
        '<span class="bar"><i style="width:{:.2f}%"></i><i class="lost" style="width:{:.2f}%"></i></span>'
    ).format(100 * step.rows_kept / total, 100 * (step.rows_in - step.rows_kept) / total)


def _share_bar(rows: int, total: int) -> Markup:
    return Markup('<span class="bar"><i style="width:{:.2f}%"></i></span>').format(100 * rows / max(1, total))


def _place(rejection: Rejection) -> str:
    """Return where a row came from as `file:line`, its source where there is no file."""
    place = rejection.origin.place or rejection.origin.source
    return place if rejection.origin.line is None else f"{place}:{rejection.origin.line}"


def _row_excerpt(rejection: Rejection) -> str:
    """Return the beginning of the raw row, or of the parsed one where only that was kept."""
    text = rejection.excerpt
    if not text and rejection.record is not None:
        record = rejection.record
        text = " → ".join([record.messages[-1].content, *(response.content for response in record.responses)])
    return text if len(text) <= _EXCERPT_CHARACTERS else text[: _EXCERPT_CHARACTERS - 1] + "…"


def _minute(created_at: str) -> str:
    """Return `2025-11-21 08:03 UTC` of an ISO time in UTC; other forms as they are."""
    day, separator, time = created_at.partition("T")
    return f"{day} {time[:5]} UTC" if separator and time.endswith(("Z", "+00:00")) else created_at
