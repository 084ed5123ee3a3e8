"""Scores: read at the last token, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pipeline_lib.models.heads import head_of, init_head, load_scalar_model, scalar_at, scores
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import pack, pad
from tests.toy import byte_ids, short_tree

TREES = [
    short_tree("a", byte_ids("hello there"), byte_ids("yes"), byte_ids("no, never"), byte_ids("x")),
    short_tree("b", byte_ids("hello you"), byte_ids("maybe")),
    short_tree("c", byte_ids("k"), byte_ids("a long answer, much longer"), byte_ids("short")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, seed=0)
    model = load_scalar_model(folder, dtype=torch.float32).eval()
    init_head(model, seed=2)
    return model


def score_alone(model: PreTrainedModel, tree: Tree, response: tuple[int, ...]) -> float:
    """The score that transformers' own classification forward gives: an independent reading."""
    whole = torch.tensor([[*tree.prompt_ids, *response]])
    with torch.no_grad():
        return float(model(whole).logits[0, 0])


def test_a_score_does_not_depend_on_padding_or_packing(model: PreTrainedModel) -> None:
    expected = [score_alone(model, tree, ids) for tree in TREES for ids in tree.response_ids]
    assert max(expected) - min(expected) > 1e-2
    with torch.no_grad():
        for batch in (pack(TREES), pad(TREES, pad_id=0), pad(TREES, pad_id=2)):
            torch.testing.assert_close(scores(model, batch), torch.tensor(expected), rtol=0, atol=1e-5)
        first = scores(model, pack(TREES[:1]))
    torch.testing.assert_close(first, torch.tensor(expected[:3]), rtol=0, atol=1e-5)


def test_other_software_reads_the_same_head(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    assert torch.equal(head_of(loaded).weight, head_of(model).weight)
    for tree in TREES:
        ids = tree.response_ids[0]
        assert score_alone(loaded, tree, ids) == pytest.approx(score_alone(model, tree, ids), abs=1e-6)


def test_the_head_is_drawn_with_the_published_spread(model: PreTrainedModel) -> None:
    head = head_of(model)
    drawn = []
    for seed in range(200):
        init_head(model, seed=seed)
        drawn.append(head.weight.detach().clone())
    init_head(model, seed=2)
    values = torch.cat(drawn)
    assert float(values.std()) == pytest.approx(1 / (64 + 1) ** 0.5, rel=0.03)
    assert float(values.mean()) == pytest.approx(0.0, abs=0.005)
    assert head.bias is None


def test_the_head_is_a_function_of_its_seed(model: PreTrainedModel) -> None:
    init_head(model, seed=2)
    first = head_of(model).weight.detach().clone()
    init_head(model, seed=3)
    assert not torch.equal(head_of(model).weight, first)
    init_head(model, seed=2)
    assert torch.equal(head_of(model).weight, first)


def test_the_head_is_applied_by_hand_in_float32() -> None:
    hidden_PD = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]], dtype=torch.bfloat16)
    found = scalar_at(hidden_PD, torch.tensor([[2.0, 10.0]]), torch.tensor([2, 0, 0]))
    assert found.dtype == torch.float32
    assert found.tolist() == [3.5, 22.0, 22.0]
