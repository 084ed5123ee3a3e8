"""LLaMA-2's piecewise reward, against numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from pipeline_lib.errors import ConfigError
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.rewards.contract import Sample
from pipeline_lib.training.rewards.llama2 import is_by_safety, whitened
from tests.unit.training.reward_samples import Heard, sample, scored

LOGIT_015 = -1.7346010553881064
"""ln(0.15 / 0.85), from mpmath."""


def models(**raw: Sequence[float]) -> Heard:
    """Reward models that give these raw scores; normalised ones are refused."""
    heard = Heard()

    def scores_of(name: str, trees: Sequence[Tree], *, is_raw: bool) -> list[float]:
        assert is_raw
        assert len(trees) == len(raw[name])
        return list(raw[name])

    heard.scores_of = scores_of  # type: ignore[attr-defined]
    return heard


def rows(*tags: tuple[str, ...]) -> list[Sample]:
    return [sample("text", name=f"row{place}", tags=of) for place, of in enumerate(tags)]


def combined(given: list[Sample], heard: Heard, **parameters: object) -> list[float | None]:
    resources = heard.resources(scores_of=heard.scores_of)  # type: ignore[attr-defined]
    return scored({"name": "llama2", **parameters}, given, resources)


def test_the_safety_model_decides_where_safety_is_at_stake() -> None:
    below, above = math.nextafter(LOGIT_015, -9), math.nextafter(LOGIT_015, 9)
    # Tagged; not tagged and unsafe; not tagged and exactly at the threshold; above it; safe beyond doubt.
    given = rows(("safe",), (), (), (), ("chat",))
    heard = models(safe=[5.0, below - 1e-12, LOGIT_015, above + 1e-12, 700.0], reward=[1.0, 2.0, 3.0, 4.0, -900.0])
    assert combined(given, heard, whiten=False) == [5.0, below - 1e-12, 3.0, 4.0, -900.0]
    assert heard.figures["by_safety_frac"] == 0.4
    assert heard.figures["helpful_logit"] == pytest.approx(-178.0)


def test_the_threshold_is_strict() -> None:
    threshold = math.log(0.15 / 0.85)
    assert threshold == pytest.approx(LOGIT_015, abs=1e-15)
    assert is_by_safety([threshold], [False], threshold_frac=0.15) == [False]
    assert is_by_safety([math.nextafter(threshold, -1e9)], [False], threshold_frac=0.15) == [True]
    assert is_by_safety([0.0], [False], threshold_frac=0.5) == [False]


def test_whitening_is_over_the_combined_scores() -> None:
    # Combined 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5.
    heard = models(safe=[1.0, 0.0, 0.0, 0.0], reward=[50.0, 2.0, 3.0, 6.0])
    found = combined(rows(("safe",), (), (), ()), heard)
    assert found == pytest.approx([-1.0690449661, -0.5345224831, 0.0, 1.6035674492], abs=1e-9)


def test_equal_scores_whiten_to_zero() -> None:
    assert whitened([2.0, 2.0, 2.0]) == [0.0, 0.0, 0.0]
    assert whitened([]) == []


def test_names_tags_and_threshold_are_parameters() -> None:
    heard = models(harmless=[-0.5, -0.5], kind=[9.0, 9.0])
    parameters = {"helpful": "kind", "safe": "harmless", "safety_tags": ["risky"], "threshold_frac": 0.3}
    # ln(0.3 / 0.7) = -0.847: -0.5 is above it.
    assert combined(rows(("safe",), ("risky",)), heard, whiten=False, **parameters) == [9.0, -0.5]


@pytest.mark.parametrize("threshold", [0, 1, -0.1])
def test_a_threshold_outside_of_probabilities_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold_frac"):
        combined([], models(), threshold_frac=threshold)
