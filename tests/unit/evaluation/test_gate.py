"""The gate beside its golden cases: intervals decide, corrections bite, policies are checked."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate import GatePolicy, decide
from pipeline_lib.schema import Verdict
from pipeline_lib.stages.gate import GateConfig
from pipeline_lib.validation import validate
from tests.golden.check_gate import example, model

GATES = sorted((Path(__file__).parents[3] / "configs" / "gates").glob("*.yaml"))
SCORE = {"name": "score", "against": "base"}


def noisy(seed: int, shift: float = 0.5, num: int = 40) -> tuple[Any, ...]:
    draw = random.Random(seed)
    return tuple(example(k, score=draw.gauss(shift, 1)) for k in range(num))


EVIDENCE = Evidence({"base": noisy(0, 0.0), "dpo": noisy(1), "ppo": noisy(2)}, {})


def policy(*rules: dict[str, Any], **more: Any) -> GatePolicy:
    return validate(GatePolicy, {"rules": list(rules), **more}, where="the test")


def gain(name: str, confidence_frac: float) -> Any:
    columns = [[row.score for row in EVIDENCE.models[key]] for key in (name, "base")]
    return stats.interval(columns, stats.difference_of_means, stats.Bootstrap(confidence_frac=confidence_frac))


def run(chosen: GatePolicy, *names: str, given: Evidence = EVIDENCE) -> Verdict:
    return decide(chosen, given, {name: model(name) for name in names}, None)


def test_the_unfavourable_end_decides() -> None:
    found = gain("dpo", 0.95)
    between = (found.low + found.value) / 2
    above = (found.high + found.value) / 2
    for rule, is_passed in (
        ({"at_least": found.low - 1e-9}, True),
        ({"at_least": between}, False),
        ({"at_least": between, "bound": "estimate"}, True),
        ({"at_most": found.high + 1e-9}, True),
        ({"at_most": above}, False),
        ({"at_most": above, "bound": "estimate"}, True),
    ):
        verdict = run(policy({"metric": SCORE, **rule}), "dpo")
        assert verdict.candidate("dpo").is_passed is is_passed
        assert verdict.winner == ("dpo" if is_passed else None)
        (result,) = verdict.candidate("dpo").rules
        assert result.estimate == found
        assert (" is not " in result.reason) is not is_passed


def test_a_second_candidate_makes_the_test_stricter() -> None:
    threshold = (gain("dpo", 0.95).low + gain("dpo", 0.975).low) / 2
    assert gain("dpo", 0.975).low < threshold < gain("dpo", 0.95).low
    chosen = policy({"metric": SCORE, "at_least": threshold})
    assert run(chosen, "dpo").winner == "dpo"
    assert not run(chosen, "dpo", "ppo").candidate("dpo").is_passed


def test_equal_candidates_the_first_wins() -> None:
    given = Evidence({"base": noisy(0, 0.0), "b": noisy(1), "a": noisy(1)}, {})
    assert run(policy({"metric": SCORE, "at_least": -9.0}), "b", "a", given=given).winner == "b"


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_one_bad_figure_fails_the_rule(bad: float | None) -> None:
    rows = list(EVIDENCE.models["dpo"])
    rows[3] = rows[3].model_copy(update={"score": bad})
    given = replace(EVIDENCE, models={**EVIDENCE.models, "dpo": tuple(rows)})
    verdict = run(policy({"metric": SCORE, "at_least": -1e9}), "dpo", given=given)
    (result,) = verdict.candidate("dpo").rules
    assert (result.status, result.reason) == ("fail", "the figure is missing or not finite")
    assert verdict.winner is None
    assert verdict.candidate("dpo").rank_value is None


def test_a_bad_figure_of_one_candidate_is_not_the_others() -> None:
    rows = tuple(row.model_copy(update={"score": math.nan}) for row in EVIDENCE.models["ppo"])
    given = replace(EVIDENCE, models={**EVIDENCE.models, "ppo": rows})
    assert run(policy({"metric": SCORE, "at_least": -9.0}), "ppo", "dpo", given=given).winner == "dpo"


def test_too_few_pairs_of_the_judge() -> None:
    given = replace(EVIDENCE, reward_model={"test_accuracy_frac": 1.0, "test_pairs": 19.0})
    chosen = policy({"metric": {"name": "reward_model_accuracy"}, "at_least": 0.1}, min_examples=20)
    (result,) = run(chosen, "dpo", given=given).candidate("dpo").rules
    assert (result.status, result.reason) == ("fail", "19 examples are fewer than 20")


def test_the_verdict_says_everything_and_can_be_read_back() -> None:
    chosen = policy(
        {"metric": SCORE, "at_least": -9.0},
        {"metric": {"name": "win_rate", "against": "champion"}, "at_least": 0.5},
        {"metric": {"name": "length"}, "at_most": 9, "bound": "estimate"},
        {"metric": {"name": "kl"}, "at_most": 9},
    )
    verdict = run(chosen, "dpo")
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    assert GatePolicy.model_validate(verdict.policy) == chosen
    assert [rule.rule for rule in verdict.candidate("dpo").rules] == [
        "score against base: lower bound at least -9",
        "win_rate against champion: lower bound at least 0.5",
        "length: estimate at most 9",
        "kl: upper bound at most 9",
    ]
    assert [rule.reason for rule in verdict.candidate("dpo").rules][1:3] == [
        "there is no champion yet",
        "4 is at most 9",
    ]
    assert run(chosen, "dpo") == verdict


def test_no_candidates_no_winner() -> None:
    verdict = run(policy({"metric": SCORE, "at_least": 0.0}))
    assert (verdict.candidates, verdict.winner) == ((), None)


def test_defaults_of_a_metric_are_written_out() -> None:
    """The stage key sees them: another default is another verdict."""
    chosen = policy({"metric": {"name": "distinct_n"}, "at_least": 0.1})
    assert chosen.rules[0].metric == {"name": "distinct_n", "against": None, "n": 2}
    assert chosen.select_by == {"name": "score", "against": None}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rules": []}, "rules"),
        ({"rules": [{"metric": SCORE}]}, "either at_least or at_most"),
        ({"rules": [{"metric": SCORE, "at_least": 0, "at_most": 1}]}, "either at_least or at_most"),
        ({"rules": [{"metric": SCORE, "at_least": math.nan}]}, "at_least"),
        ({"rules": [{"metric": SCORE, "at_least": 0, "bound": "upper"}]}, "bound"),
        ({"rules": [{"metric": {"name": "win_rat"}, "at_least": 0}]}, "did you mean 'win_rate'"),
        ({"rules": [{"metric": {"name": "kl", "against": "sft"}, "at_most": 9}]}, "against"),
        ({"rules": [{"metric": SCORE, "at_least": 0}], "min_examples": 0}, "min_examples"),
        ({"rules": [{"metric": SCORE, "at_least": 0}], "bootstrap": {"confidence_frac": 1.0}}, "confidence_frac"),
        ({"rules": [{"metric": SCORE, "at_least": 0}], "minimum": 3}, "unknown key 'minimum'"),
    ],
)
def test_bad_policies_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(GatePolicy, bad, where="the test")


@pytest.mark.parametrize("path", GATES, ids=[path.stem for path in GATES])
def test_every_policy_of_the_repository_loads(path: Path) -> None:
    by_name = validate(GateConfig, {"policy": path.stem}, where="the test").policy
    assert by_name == validate(GateConfig, {"policy": str(path)}, where="the test").policy
    assert by_name.rules
    if path.stem != "smoke":  # smoke asks for sanity alone
        assert run(by_name, "dpo").winner is None  # this evidence is not enough for any of the others


def test_there_are_policies_and_one_is_the_default() -> None:
    assert "default" in {path.stem for path in GATES}
    assert GateConfig().policy == validate(GateConfig, {"policy": "default"}, where="the test").policy


def test_evidence_on_other_prompts_is_refused() -> None:
    rows = noisy(0)
    with pytest.raises(DataError, match=r"different prompts, e\.g\. 000000000000"):
        Evidence({"base": rows, "dpo": rows[:-1]}, {})
    with pytest.raises(DataError, match=r"different prompts \(another order\)"):
        Evidence({"base": rows, "dpo": rows[::-1]}, {})
