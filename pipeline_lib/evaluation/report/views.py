"""What the page says of the gathered data: headline, tiles, titles of curves, configuration as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from markupsafe import Markup
from ruamel.yaml import YAML

from pipeline_lib.evaluation.report.charts import line_chart
from pipeline_lib.evaluation.report.comparison import ComparisonRow
from pipeline_lib.evaluation.report.gather import ReportData, Training
from pipeline_lib.evaluation.report.lineage import Lineage
from pipeline_lib.evaluation.report.series import Series
from pipeline_lib.evaluation.report.wording import bounds, count, number, percent, plain
from pipeline_lib.schema import CandidateVerdict, Interval, Verdict

_STAGE_TITLES = {
    "sft": "Supervised fine-tuning", "reward": "Reward model", "preference": "Preference optimisation",
    "conditional": "Conditional fine-tuning", "ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO",
}  # fmt: skip
_GROUP_CURVES = (
    ("loss", "Loss"), ("policy_loss", "Policy loss"), ("kl_loss", "KL term of the loss"),
    ("clip_frac", "Clipped share"), ("approx_kl_nats", "KL from the rollout policy (nats)"),
)  # fmt: skip
_CURVES: dict[str, tuple[tuple[str, str], ...]] = {
    "sft": (("loss", "Loss (nats a token)"), ("grad_norm_policy", "Gradient norm"), ("learning_rate", "Learning rate")),
    "reward": (("loss", "Loss"), ("accuracy_frac", "Training accuracy"), ("margin", "Margin of scores")),
    "preference": (
        ("loss", "Loss"), ("accuracy_frac", "Training accuracy"),
        ("log_ratio_margin_nats", "Log-ratio margin (nats)"),
    ),
    "ppo": (
        ("loss", "Loss"), ("policy_loss", "Policy loss"), ("value_loss", "Value loss"),
        ("explained_variance_frac", "Explained variance of returns"),
        ("clip_frac", "Clipped share"), ("value_clip_frac", "Clipped share of values"),
        ("approx_kl_nats", "KL from the rollout policy (nats)"),
    ),
    "rloo": _GROUP_CURVES,
    "grpo": _GROUP_CURVES,
}  # fmt: skip
_SET_FIGURES = ("learning_rate",)
_WORDS_OF_LENGTH_BIAS = 100


@dataclass(frozen=True)
class Decision:
    """The verdict in words."""

    headline: str
    sentence: str


@dataclass(frozen=True)
class CandidateView:
    """One candidate's verdict, and its rules in one phrase."""

    verdict: CandidateVerdict
    tally: str


@dataclass(frozen=True)
class Tile:
    """One figure that deserves large type."""

    title: str
    now: str
    note: str
    before: str = ""


@dataclass(frozen=True)
class Curve:
    """A drawn figure over steps."""

    title: str
    drawing: Markup
    first: float
    last: float


@dataclass(frozen=True)
class StageCurves:
    """A training stage with its curves."""

    title: str
    ref: str
    num_steps: int
    rows: int | None
    wall_s: float | None
    charts: tuple[Curve, ...]


def decision(verdict: Verdict, *, promotes: bool = True) -> Decision:
    """Say who won and why, or why nobody did; with promotion off, the winner is only said to be the best."""
    others = [candidate for candidate in verdict.candidates if candidate.name != verdict.winner]
    if verdict.winner is None:
        failed = [_why_not(candidate) for candidate in others]
        why = "; ".join(failed) or "there was no candidate"
        return Decision("Not promoted", f"No candidate passed the gate: {why}. {_champion_stays(verdict)}")
    winner = verdict.candidate(verdict.winner)
    num_rules = len(winner.rules) - len(_rules(winner, "not_applicable"))
    reason = f"{winner.name} passed all {num_rules} rules that apply"
    passed = [candidate.name for candidate in others if candidate.is_passed]
    failed = [candidate.name for candidate in others if not candidate.is_passed]
    if passed:
        reason += f" and ranks before {_listed(passed)}"
    if failed:
        reason += f"; {_listed(failed)} did not pass"
    if not promotes:
        return Decision(f"Best: {winner.name}", f"{reason}. Promotion is off in this run.")
    headline = "{} stays champion" if verdict.champion == winner.model else "Promoted: {}"
    return Decision(headline.format(winner.name), f"{reason}. {_replaces(verdict, winner)}")


def candidate_views(verdict: Verdict) -> list[CandidateView]:
    """Return the candidates with their rules counted, the winner first."""
    ordered = sorted(verdict.candidates, key=lambda candidate: candidate.name != verdict.winner)
    return [CandidateView(candidate, _tally(candidate)) for candidate in ordered]


def verdict_tiles(verdict: Verdict, comparison: Sequence[ComparisonRow]) -> list[Tile]:
    """Return the winner's main figures beside the base model's; nothing where nobody won."""
    if verdict.winner is None:
        return []
    tiles = []
    for row in comparison:
        interval = row.intervals.get(verdict.winner)
        if row.is_key and interval is not None and interval.value is not None:
            base = row.intervals.get("base")
            tiles.append(
                Tile(
                    row.title, number(interval.value),
                    ", ".join(part for part in (bounds(interval), row.direction) if part),
                    number(base.value) if base is not None and row.has_before else "",
                )
            )  # fmt: skip
    return tiles


def stage_curves(data: ReportData) -> list[StageCurves]:
    """Draw the curves of every training stage that has any."""
    found = []
    for training in data.trainings:
        charts = _drawn(training.series, _curves_of(training), "step")
        if charts:
            rows = training.facts.get("rows")
            found.append(
                StageCurves(
                    _title(training), str(training.ref),
                    max(len(points) for points in training.series.values()), rows if isinstance(rows, int) else None,
                    data.lineage[training.ref].manifest.measurements.get("wall_s"), charts,
                )
            )  # fmt: skip
    return found


def reward_model_tiles(card: Mapping[str, float], accuracy: Interval) -> list[Tile]:
    """Put the reward model's report card into words."""
    pairs = f"{count(card.get('test_pairs'))} held-out pairs, interval {bounds(accuracy)}; guessing gives 50 %"
    margin, gain, slope = (card.get(key) for key in ("test_margin", "normalization_gain", "length_bias_per_word"))
    in_std = f"{number(margin * gain)} standard deviations of the score" if margin and gain else "score units"
    bias = None if slope is None else slope * _WORDS_OF_LENGTH_BIAS * (gain or 1.0)
    tiles = [
        Tile("Held-out accuracy", percent(card.get("test_accuracy_frac")), pairs),
        Tile("Mean margin, better minus worse", number(margin), in_std),
        Tile(
            "Length bias", number(bias),
            f"{'standard deviations of the score' if gain else 'score units'} for {_WORDS_OF_LENGTH_BIAS} words more; "
            "0 is unbiased",
        ),
        Tile(
            "Normalisation", number(gain),
            f"gain on the raw score; bias {number(card.get('normalization_bias'))}",
        ),
    ]  # fmt: skip
    further = {
        "test_auc_frac": ("AUC", "chance that a better response beats a worse one of any prompt"),
        "test_brier": ("Brier score", "0 is perfect, 0.25 is guessing"),
        "test_calibration_error_frac": ("Calibration error", "mean distance of confidence and accuracy"),
        "test_accuracy_longer_worse_frac": (
            "Accuracy where the longer is worse",
            "low where length is taken for quality",
        ),
    }
    for name, (title, note) in further.items():
        if name in card:
            shown = number(card[name]) if name == "test_brier" else percent(card[name])
            tiles.append(Tile(title, shown, note))
    return tiles


def selected_by(verdict: Verdict) -> str:
    """Return the figure by which passing candidates are ordered, in words."""
    chosen = verdict.policy.get("select_by")
    if isinstance(chosen, Mapping):
        against = chosen.get("against")
        return plain(str(chosen.get("name", "figure"))) + (f" against {against}" if against else "")
    return "the policy's figure"


def configurations(lineage: Lineage) -> list[tuple[str, str]]:
    """Return the configuration of every stage as YAML, each different one once."""
    seen: dict[tuple[str, str], None] = {}
    for node in lineage.own:
        seen.setdefault((node.stage, as_yaml(node.manifest.config)))
    return list(seen)


def versions(lineage: Lineage) -> str:
    """Return all library versions that artifacts of the run were made with, as lines."""
    found: dict[str, set[str]] = {}
    for node in lineage.own:
        for library, version in node.manifest.versions.items():
            found.setdefault(library, set()).add(version)
    return "\n".join(f"{library} {', '.join(sorted(all_of))}" for library, all_of in sorted(found.items()))


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return values as YAML, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096
    text = StringIO()
    yaml.dump(dict(values), text)
    return text.getvalue().rstrip("\n")


def _title(training: Training) -> str:
    title = _STAGE_TITLES.get(training.stage, training.stage)
    names = [name for name in training.names if name not in (training.stage, "champion")]
    return f"{title} ({', '.join(names)})" if names else title


def _curves_of(training: Training) -> Sequence[tuple[str, str]]:
    return _CURVES.get(training.stage, (("loss", "Loss"),))


def _drawn(series: Series, curves: Sequence[tuple[str, str]], x_label: str) -> tuple[Curve, ...]:
    return tuple(
        Curve(
            title, line_chart(
                series[name], title=f"{title}, over {x_label}s ({plain(name)})", x_label=x_label,
                is_noisy=name not in _SET_FIGURES,
            ),
            series[name][0][1], series[name][-1][1],
        )
        for name, title in curves
        if series.get(name)
    )  # fmt: skip


def _rules(candidate: CandidateVerdict, status: str) -> list[str]:
    return [rule.metric for rule in candidate.rules if rule.status == status]


def _why_not(candidate: CandidateVerdict) -> str:
    failed = _rules(candidate, "fail")
    if failed:
        return f"{candidate.name} failed {_listed(list(dict.fromkeys(failed)))}"
    if candidate.is_passed:
        return f"{candidate.name} passed but has no figure to be ranked by"
    return f"no rule applied to {candidate.name}"


def _tally(candidate: CandidateVerdict) -> str:
    words = {"pass": "passed", "fail": "failed", "not_applicable": "not applicable"}
    parts = [(len(_rules(candidate, status)), word) for status, word in words.items()]
    return ", ".join(f"{num} {word}" for num, word in parts if num) or "no rules"


def _champion_stays(verdict: Verdict) -> str:
    return f"The champion stays {verdict.champion}." if verdict.champion else "There is no champion yet."


def _replaces(verdict: Verdict, winner: CandidateVerdict) -> str:
    if verdict.champion is None:
        return "It is the first champion."
    if verdict.champion == winner.model:
        return "It already is the champion."
    return f"It replaces the champion {verdict.champion}."


def _listed(words: Sequence[str]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else "".join(words)
