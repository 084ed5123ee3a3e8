"""The gate: a pure function from evidence and a policy to a verdict.

A candidate passes when every rule passes (an intersection-union test, which needs no correction
over rules). Several candidates are several chances to pass by luck, so each is tested at a
confidence corrected by Bonferroni over the candidates. A figure that is missing, not finite or
based on too few prompts fails its rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate_metrics import GATE_METRICS
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.registry import PluginSpec
from pipeline_lib.schema import ArtifactRef, CandidateVerdict, Interval, RuleResult, Verdict
from pipeline_lib.validation import Frozen

CHAMPION = "champion"


MetricSpec = Annotated[PluginSpec, AfterValidator(GATE_METRICS.complete)]


class Rule(Frozen):
    """One condition on one metric."""

    metric: MetricSpec
    """The metric and its parameters; `prefline list gate-metrics` prints them all."""
    at_least: float | None = Field(None, title="At least")
    """The bound must not be below this."""
    at_most: float | None = Field(None, title="At most")
    """The bound must not be above this."""
    bound: Literal["conservative", "estimate"] = "conservative"
    """Which number is compared: the interval's unfavourable end, or the estimate itself."""

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a rule has either at_least or at_most")
        return self

    @property
    def threshold(self) -> float:
        """The number compared with."""
        threshold = self.at_least if self.at_least is not None else self.at_most
        assert threshold is not None
        return threshold

    def in_words(self, against: str | None) -> str:
        """Return the rule as people read it."""
        versus = f" against {against}" if against else ""
        if self.bound == "estimate":
            which = "estimate"
        else:
            which = "lower bound" if self.at_least is not None else "upper bound"
        side = "at least" if self.at_least is not None else "at most"
        return f"{self.metric['name']}{versus}: {which} {side} {self.threshold:g}"


class GatePolicy(Frozen):
    """What a candidate must show to be promoted."""

    rules: tuple[Rule, ...] = Field(min_length=1)
    """All of them must pass."""
    select_by: MetricSpec = Field({"name": "score"}, title="Select by", validate_default=True)
    """Orders the candidates that pass; higher is better."""
    bootstrap: Bootstrap = Bootstrap()
    """Resamples and confidence, before the correction over candidates."""
    min_examples: int = Field(20, ge=1)
    """Held-out prompts that a figure must be based on."""


def decide(
    policy: GatePolicy,
    evidence: Evidence,
    candidates: Mapping[str, ArtifactRef],
    champion: ArtifactRef | None,
) -> Verdict:
    """Apply a policy to every candidate and choose the best that passes.

    Args:
        policy: The rules.
        evidence: Results of the candidates and of every model that a rule compares with.
        candidates: Model of each candidate by its name in the evidence.
        champion: The present champion; rules against it do not apply where there is none.
    """
    corrected = 1 - (1 - policy.bootstrap.confidence_frac) / max(1, len(candidates))
    bootstrap = policy.bootstrap.model_copy(update={"confidence_frac": corrected})
    verdicts = tuple(_judge(policy, evidence, name, model, champion, bootstrap) for name, model in candidates.items())
    passed = [verdict for verdict in verdicts if verdict.is_passed and verdict.rank_value is not None]
    winner = max(passed, key=lambda verdict: verdict.rank_value or 0.0).name if passed else None
    return Verdict(candidates=verdicts, winner=winner, champion=champion, policy=policy.model_dump(mode="json"))


def _judge(
    policy: GatePolicy,
    evidence: Evidence,
    name: str,
    model: ArtifactRef,
    champion: ArtifactRef | None,
    bootstrap: Bootstrap,
) -> CandidateVerdict:
    rules = tuple(_apply(rule, policy, evidence, name, model, champion, bootstrap) for rule in policy.rules)
    order: Any = GATE_METRICS.build(policy.select_by)
    is_measured = name in evidence.models and (order.against is None or order.against in evidence.models)
    rank_value = order.measure(evidence, name, bootstrap=bootstrap).value if is_measured else None
    is_passed = all(result.status != "fail" for result in rules) and any(r.status == "pass" for r in rules)
    return CandidateVerdict(name=name, model=model, is_passed=is_passed, rules=rules, rank_value=rank_value)


def _apply(
    rule: Rule,
    policy: GatePolicy,
    evidence: Evidence,
    name: str,
    model: ArtifactRef,
    champion: ArtifactRef | None,
    bootstrap: Bootstrap,
) -> RuleResult:
    metric: Any = GATE_METRICS.build(rule.metric)
    empty = Interval(value=None, low=None, high=None, confidence_frac=bootstrap.confidence_frac, num_examples=0)

    def result(estimate: Interval, status: Literal["pass", "fail", "not_applicable"], reason: str) -> RuleResult:
        return RuleResult(
            rule=rule.in_words(metric.against), metric=rule.metric["name"], against=metric.against,
            unit=metric.unit, estimate=estimate, threshold=rule.threshold, status=status, reason=reason,
        )  # fmt: skip

    if metric.against == CHAMPION and champion is None:
        return result(empty, "not_applicable", "there is no champion yet")
    if metric.against == CHAMPION and champion == model:
        return result(empty, "not_applicable", "the candidate is the champion")
    for needed in (name, metric.against):
        if needed is not None and needed not in evidence.models:
            return result(empty, "fail", f"there are no results of {needed!r}")
    estimate: Interval = metric.measure(evidence, name, bootstrap=bootstrap)
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return result(estimate, "fail", "the figure is missing or not finite")
    if estimate.num_examples < policy.min_examples:
        return result(estimate, "fail", f"{estimate.num_examples} examples are fewer than {policy.min_examples}")
    unfavourable = estimate.low if rule.at_least is not None else estimate.high
    compared = estimate.value if rule.bound == "estimate" else unfavourable
    is_met = compared >= rule.threshold if rule.at_least is not None else compared <= rule.threshold
    word = "at least" if rule.at_least is not None else "at most"
    reason = f"{compared:.4g} {'is' if is_met else 'is not'} {word} {rule.threshold:g}"
    return result(estimate, "pass" if is_met else "fail", reason)
