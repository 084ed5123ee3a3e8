"""Scores depend on the prompt and the response alone, and a model for which that is not so is stopped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.errors import DivergedError
from pipeline_lib.models import scoring
from pipeline_lib.models.heads import head_of, init_head, load_scalar_model
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.score_invariance import check_scores_do_not_move, furthest, score_differences
from tests.toy import COMPARISONS, encoder, layout

TREES = [encoder().tree(row) for row in COMPARISONS]


@pytest.fixture
def model(directory: Path) -> PreTrainedModel:
    loaded = load_scalar_model(directory, dtype=torch.float32)
    init_head(loaded, seed=1)
    return loaded.eval()


def check(model: PreTrainedModel, **how: bool) -> dict[str, float]:
    return check_scores_do_not_move(model, TREES, layout(**how), dtype=torch.float32)


@pytest.mark.parametrize(("is_packed", "forms"), [(True, {"padded", "packed"}), (False, {"padded"})])
def test_scores_of_a_sound_model_stay(model: PreTrainedModel, is_packed: bool, forms: set[str]) -> None:
    found = check(model, is_packed=is_packed)
    assert found.keys() == forms
    assert max(found.values()) <= 1e-5


def test_low_precision_has_its_own_tolerance(model: PreTrainedModel) -> None:
    model = model.to(torch.bfloat16)
    assert max(check_scores_do_not_move(model, TREES, layout(), dtype=torch.bfloat16).values()) <= 5e-2


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_scores_that_depend_on_the_batch_are_stopped(
    form: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that reads its neighbours: the more rows or trees are beside a response, the higher its score."""
    honest = scoring.scores

    def company(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
        is_padded = batch.input_ids_BT.shape[0] > 1
        others = len(batch.trees) - 1 if is_padded == (form == "padded") else 0
        return honest(model, batch) + 1e-3 * others

    monkeypatch.setattr(scoring, "scores", company)
    with pytest.raises(DivergedError, match=rf"a {form} batch moves scores by \d\.\d+e-0\d"):
        check(model)


def test_a_score_that_is_no_number_is_stopped(model: PreTrainedModel) -> None:
    with torch.no_grad():
        head_of(model).weight.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"the reward model scores row \w{12} with \[nan"):
        check(model)


def test_one_row_is_enough(model: PreTrainedModel) -> None:
    assert max(score_differences(model, TREES[:1], layout()).values()) <= 1e-5


def test_furthest_by_hand() -> None:
    assert furthest({"a": [1.0, 2.0], "b": [3.0]}, {"a": [1.5, 2.0], "b": [2.25]}) == 0.75
    with pytest.raises(ValueError, match="different records"):
        furthest({"a": [1.0]}, {"b": [1.0]})
