"""What every gate metric must do, over the whole table; and a figure of each worked by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pipeline_lib.errors import ConfigError
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate_metrics import GATE_METRICS
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.schema import ExampleResult, Interval
from tests.golden.check_gate import example

BOOTSTRAP = Bootstrap(resamples=200)
WORDS = ("the", "a", "model", "answers", "with", "some", "words", "about", "light", "air", "blue", "sky", "why")
MISSING: dict[str, dict[str, Any]] = {
    "bleu": {"reference": ""},
    "distinct_n": {"response": "?"},
    "kl": {"logp": None},
    "perplexity": {"reference_nll_nats": None},
    "rouge_l": {"rouge_l_frac": None},
    "score": {"score": None},
    "win_rate": {"score": None},
}
"""What takes the figure from every metric that a row may lack; counts and flags are always there."""
ALWAYS_THERE = {"finished", "length"}
OF_TEXTS = {"bleu", "distinct_n"}
"""Metrics that read texts, which are no numbers."""
JUDGE = {"test_accuracy_frac": 0.75, "test_pairs": 40.0}

every_metric = pytest.mark.parametrize("name", list(GATE_METRICS))


def comparative() -> list[str]:
    """Name the metrics that compare with another model."""
    return [name for name in GATE_METRICS if GATE_METRICS[name].model_fields["against"].annotation is not type(None)]


def evidence(*, num: int = 24, seed: int = 0) -> Evidence:
    draw = random.Random(seed)

    def row(number: int) -> ExampleResult:
        response = draw.choices(WORDS, k=draw.randrange(4, 12))
        return example(
            number, response=" ".join(response), reference=" ".join((*response[: number % 8], "sky")),
            score=draw.gauss(0, 1),
            response_tokens=draw.randrange(4, 20), is_finished=draw.random() < 0.8, rouge_l_frac=draw.random(),
            reference_nll_nats=draw.uniform(3, 9), logp=draw.uniform(-20, -5), reference_model_logp=-12.0,
        )  # fmt: skip

    return Evidence({name: tuple(row(k) for k in range(num)) for name in ("dpo", "base")}, JUDGE)


def changed(given: Evidence, model: str, number: int, **figures: Any) -> Evidence:
    rows = list(given.models[model])
    rows[number] = rows[number].model_copy(update=figures)
    return replace(given, models={**given.models, model: tuple(rows)})


def measure(name: str, given: Evidence, *, bootstrap: Bootstrap = BOOTSTRAP, **parameters: Any) -> Interval:
    result = GATE_METRICS.build({"name": name, **parameters}).measure(given, "dpo", bootstrap=bootstrap)
    assert isinstance(result, Interval)
    return result


def is_nothing(interval: Interval) -> bool:
    return (interval.value, interval.low, interval.high) == (None, None, None)


@every_metric
def test_contract(name: str) -> None:
    metric = GATE_METRICS.build({"name": name})
    assert isinstance(metric, BaseModel)
    assert type(metric).model_config["frozen"] is True
    assert type(metric).__module__.rpartition(".")[2] == name
    assert type(metric).__name__.lower() == name.replace("_", "")
    assert getattr(metric, "unit", "")
    for field_name, field in type(metric).model_fields.items():
        assert field.description, f"{name}.{field_name} has no description"
    with pytest.raises(ConfigError, match="unknown key 'no_such'"):
        GATE_METRICS.build({"name": name, "no_such": 1})


@every_metric
def test_a_parameter_that_means_nothing_is_refused(name: str) -> None:
    if name not in comparative():
        with pytest.raises(ConfigError, match="against"):
            GATE_METRICS.build({"name": name, "against": "base"})


@every_metric
def test_estimate_lies_in_its_interval(name: str) -> None:
    found = measure(name, evidence())
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert found.low < found.high
    assert found.confidence_frac == 0.95
    assert found.num_examples == (40 if name == "reward_model_accuracy" else 24)


@every_metric
def test_deterministic_by_seed(name: str) -> None:
    assert measure(name, evidence()) == measure(name, evidence())
    other = measure(name, evidence(), bootstrap=BOOTSTRAP.model_copy(update={"seed": 1}))
    assert other.value == measure(name, evidence()).value


@every_metric
def test_more_confidence_is_a_wider_interval(name: str) -> None:
    narrow = measure(name, evidence(), bootstrap=BOOTSTRAP.model_copy(update={"confidence_frac": 0.8}))
    wide = measure(name, evidence(), bootstrap=BOOTSTRAP.model_copy(update={"confidence_frac": 0.99}))
    assert narrow.value == wide.value
    assert wide.low is not None
    assert wide.high is not None
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low < narrow.low
    assert narrow.high < wide.high
    assert wide.confidence_frac == 0.99


@every_metric
def test_every_metric_has_a_way_to_lack_its_figure(name: str) -> None:
    assert name in {*MISSING, *ALWAYS_THERE, "reward_model_accuracy"}


@pytest.mark.parametrize("name", list(MISSING))
@pytest.mark.parametrize("model", ["dpo", "base"])
def test_a_missing_figure_gives_nothing(name: str, model: str) -> None:
    given, rows = evidence(), range(24) if name == "distinct_n" else [7]
    for number in rows:
        given = changed(given, model, number, **MISSING[name])
    parameters: dict[str, Any] = {"against": "base"} if name in comparative() else {}
    if parameters or model == "dpo":
        assert is_nothing(measure(name, given, **parameters))


@pytest.mark.parametrize("name", [name for name in MISSING if name not in OF_TEXTS])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_gives_nothing(name: str, bad: float) -> None:
    given = changed(evidence(), "dpo", 7, **dict.fromkeys(MISSING[name], bad))
    assert is_nothing(measure(name, given))


@pytest.mark.parametrize("accuracy", [None, math.nan, math.inf, -0.1, 1.1])
def test_a_judge_without_accuracy_gives_nothing(accuracy: float | None) -> None:
    assert is_nothing(measure("reward_model_accuracy", Evidence({}, {**JUDGE, "test_accuracy_frac": accuracy})))


@pytest.mark.parametrize("pairs", [None, math.nan, math.inf, 0.0])
def test_a_judge_without_pairs_gives_nothing(pairs: float | None) -> None:
    assert is_nothing(measure("reward_model_accuracy", Evidence({}, {**JUDGE, "test_pairs": pairs})))


@every_metric
def test_no_prompts_give_nothing(name: str) -> None:
    if name != "reward_model_accuracy":
        assert is_nothing(measure(name, Evidence({"dpo": (), "base": ()}, {})))


@pytest.mark.parametrize("name", comparative())
def test_a_model_against_itself_is_a_draw_without_doubt(name: str) -> None:
    """Both are drawn together: the noise that they share falls away."""
    rows = evidence().models["dpo"]
    found = measure(name, Evidence({"dpo": rows, "base": rows}, JUDGE), against="base")
    draw = {"win_rate": 0.5, "length": 1.0, "distinct_n": 1.0, "perplexity": 1.0}.get(name, 0.0)
    assert (found.value, found.low, found.high) == (draw, draw, draw)


TWO = Evidence(
    {
        "dpo": (
            example(0, response="a b a b", response_tokens=4, is_finished=True, score=2.0, rouge_l_frac=0.5, logp=-3.0,
                    reference_model_logp=-5.0, reference_nll_nats=2.0, reference_tokens=1),
            example(1, response="a c", response_tokens=2, is_finished=False, score=1.0, rouge_l_frac=0.25, logp=-1.0,
                    reference_model_logp=-2.0, reference_nll_nats=4.0, reference_tokens=2),
        ),
        "base": (
            example(0, response="a b c d", response_tokens=6, is_finished=True, score=0.0, rouge_l_frac=0.125,
                    reference_nll_nats=3.0, reference_tokens=1),
            example(1, response="x y", response_tokens=6, is_finished=True, score=1.0, rouge_l_frac=0.125,
                    reference_nll_nats=6.0, reference_tokens=2),
        ),
    },
    JUDGE,
)  # fmt: skip
BY_HAND: list[tuple[str, dict[str, Any], float]] = [
    # Against "a b c" twice: of "a b a b" and "a c" match a, b and a, c of 6 words, ab of 4 pairs; lengths are alike.
    ("bleu", {"max_n": 2}, math.sqrt(4 / 6 * 1 / 4)),
    ("bleu", {"max_n": 2, "against": "base"}, math.sqrt(4 / 6 * 1 / 4) - math.sqrt(3 / 6 * 2 / 4)),
    ("distinct_n", {}, 3 / 4),  # ab, ba, ab; ac
    ("distinct_n", {"n": 1}, 3 / 6),
    ("distinct_n", {"against": "base"}, (3 / 4) / (4 / 4)),
    ("finished", {}, 0.5),
    ("finished", {"against": "base"}, -0.5),
    ("kl", {}, 1.5),  # (2 + 1) / 2
    ("length", {}, 3.0),
    ("length", {"against": "base"}, 0.5),  # 6 / 12
    ("perplexity", {}, math.exp(2)),  # 6 nats, 3 tokens
    ("perplexity", {"against": "base"}, math.exp(-1)),
    ("reward_model_accuracy", {}, 0.75),
    ("rouge_l", {}, 0.375),
    ("rouge_l", {"against": "base"}, 0.25),
    ("score", {}, 1.5),
    ("score", {"against": "base"}, 1.0),
    ("win_rate", {"against": "base"}, 0.75),  # a win and a tie
]


@pytest.mark.parametrize(("name", "parameters", "expected"), BY_HAND)
def test_figure_by_hand(name: str, parameters: dict[str, Any], expected: float) -> None:
    assert measure(name, TWO, **parameters).value == pytest.approx(expected, rel=1e-12)


@every_metric
def test_every_metric_has_a_figure_by_hand(name: str) -> None:
    assert any(case[0] == name for case in BY_HAND)
    if name in comparative():
        assert any(case[0] == name and case[1].get("against") for case in BY_HAND)


def test_against_is_a_name_or_nothing() -> None:
    for name in comparative():
        annotation = GATE_METRICS[name].model_fields["against"].annotation
        assert annotation is str or str in get_args(annotation)
