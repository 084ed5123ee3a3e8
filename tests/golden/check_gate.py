"""Decides the golden cases of the gate; the module may be a mutant of it."""

from __future__ import annotations

import hashlib
from types import ModuleType
from typing import Any

import pipeline_lib.evaluation.gate
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.schema import ArtifactRef, ExampleResult, Message


def model(name: str) -> ArtifactRef:
    """Return the artifact that a model's name stands for."""
    return ArtifactRef(kind="model", id=hashlib.sha256(name.encode()).hexdigest())


def example(number: int, **figures: Any) -> ExampleResult:
    """Return one model's result on one prompt."""
    values: dict[str, Any] = {
        "reference": "a b c", "response": "a b d", "response_tokens": 4, "is_finished": True,
        "reference_nll_nats": 6.0, "reference_tokens": 3, "rouge_l_frac": 0.5, "score": 1.0, "logp": -5.0,
        "reference_model_logp": -6.0, **figures,
    }  # fmt: skip
    return ExampleResult(record_id=f"{number:064d}", prompt=(Message(role="user", content="?"),), **values)


def check_decision(case: dict[str, Any], module: ModuleType = pipeline_lib.evaluation.gate) -> None:
    """Decide a case and compare every status, who passed, who won, and the confidence.

    Raises:
        AssertionError: The verdict is another one.
    """
    num = case.get("num_prompts", 20)
    models = {name: tuple(example(k, score=score) for k in range(num)) for name, score in case["scores"].items()}
    select_by = case.get("select_by", {"name": "score"})
    policy = module.GatePolicy(rules=case["rules"], select_by=select_by, bootstrap={"resamples": 100})
    champion = model(case["champion"]) if case["champion"] else None
    candidates = {name: model(name) for name in case["candidates"]}
    verdict = module.decide(policy, Evidence(models, {}), candidates, champion)
    statuses = {one.name: [rule.status for rule in one.rules] for one in verdict.candidates}
    passed = [one.name for one in verdict.candidates if one.is_passed]
    confidences = {round(rule.estimate.confidence_frac, 12) for one in verdict.candidates for rule in one.rules}
    expected = case["expected"]
    assert statuses == expected["statuses"]
    assert passed == expected["passed"]
    assert verdict.winner == expected["winner"]
    assert confidences == {expected["confidence_frac"]}
    assert verdict.champion == champion
