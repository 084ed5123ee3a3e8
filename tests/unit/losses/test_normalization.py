"""Scores brought to a target, segments' preferences, safety classification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline_lib.losses.reward.normalization import normalization
from pipeline_lib.losses.reward.pairs import safety_classification, segment_preference


def test_by_hand() -> None:
    # Mean 5, E[x^2] = (4 + 16 + 16 + 16 + 25 + 25 + 49 + 81) / 8 = 29, so the deviation is 2.
    scores = torch.tensor([2.0, 4, 4, 4, 5, 5, 7, 9])
    assert normalization(scores) == (0.5, -2.5)
    assert normalization(scores, target_mean=1.0, target_std=4.0) == (2.0, -9.0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20).filter(lambda values: max(values) - min(values) > 1e-3))
def test_normalised_scores_have_the_target(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    gain, bias = normalization(scores, target_mean=-0.5, target_std=2.0)
    normalised = gain * scores + bias
    assert float(normalised.mean()) == pytest.approx(-0.5, abs=1e-6)
    assert math.sqrt(float(normalised.square().mean() - normalised.mean().square())) == pytest.approx(2.0, rel=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="N of 2 or more"):
        normalization(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="target_std 0"):
        normalization(torch.tensor([1.0, 2.0]), target_std=0)
    with pytest.raises(ValueError, match=r"deviation 0\.0"):
        normalization(torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="deviation nan"):
        normalization(torch.tensor([1.0, float("nan")]))


def test_segments_are_compared_by_their_sums() -> None:
    first, second = torch.tensor([[1.0, 2, 0], [0, 0, 0]]).double(), torch.tensor([[0.5, 0.5], [1, 1]]).double()
    loss = segment_preference(first, second, torch.tensor([1.0, 0.5]).double())
    # Leads of 2 and -2: ln(1 + e^-2); (ln(1 + e^2) + ln(1 + e^-2)) / 2.
    assert loss.tolist() == pytest.approx([0.1269280110429726, 1.1269280110429725], rel=1e-12)
    with pytest.raises(ValueError, match="must have one shape"):
        segment_preference(first, second, torch.ones(3))


def test_safety_classification_by_hand() -> None:
    # ln(4/3), ln 4 at sigma = 3/4; extreme logits stay finite.
    logits = torch.tensor([math.log(3), math.log(3), 1e4, -1e4], dtype=torch.float64)
    found = safety_classification(logits, torch.tensor([True, False, False, False]))
    assert found.tolist() == pytest.approx([math.log(4 / 3), math.log(4), 1e4, 0.0], rel=1e-12)
    with pytest.raises(ValueError, match="must have one shape"):
        safety_classification(logits, torch.tensor([True]))
