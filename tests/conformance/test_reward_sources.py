"""What every reward source must do, over the whole table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from pipeline_lib.errors import ConfigError
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.reward_set import Weighting
from pipeline_lib.training.rewards import REWARD_SOURCES
from pipeline_lib.training.rewards.contract import Resources, RewardSource, Sample
from tests.unit.training.reward_samples import sample
from tests.unit.training.reward_server import Scorer, scorer

__all__ = ["scorer"]

every_source = pytest.mark.parametrize("name", list(REWARD_SOURCES))

# What a source needs to be built at all. A source without a line here, and with parameters that have
# no default, fails the tests.
NEEDED: dict[str, dict[str, Any]] = {
    "length": {"target": 3},
    "words": {"words": ["six", "seven"]},
    "regex": {"pattern": "s[ei]"},
    "judge": {"model": "reference"},
    "function": {"function": "table_rewards:share"},
}
TEXTS = ["six", "The answer is seven.", "", '6 {"a": 1}', "- one\n- two", "äöü 😀", "[[3]] #### 6", "x" * 3000]


def by_length(name: str, trees: Sequence[Tree], *, is_raw: bool) -> list[float]:
    return [float(len(tree.response_ids[0])) for tree in trees]


def grade(questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
    return [f"[[{len(question) % 10 + 1}]]" for question in questions]


def given() -> list[Sample]:
    return [sample(text, name=f"row{place}", reference="6", tags=("safe",)) for place, text in enumerate(TEXTS)]


@pytest.fixture
def build(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Return what builds a source of a name."""
    (tmp_path / "table_rewards.py").write_text("def share(rows): return [len(row['response']) for row in rows]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PREFLINE_REWARD_FUNCTIONS", "table_rewards")

    def built(name: str, **parameters: Any) -> Any:
        needed = {"url": scorer.url} if name == "http" else NEEDED.get(name, {})
        return REWARD_SOURCES.build({"name": name, **needed, **parameters})

    return built


@every_source
def test_contract(name: str, build: Any) -> None:
    source = build(name)
    assert isinstance(source, BaseModel)
    assert isinstance(source, RewardSource)
    assert type(source).model_config["frozen"] is True
    assert name == type(source).__module__.rpartition(".")[2]
    assert name.replace("_", "") == type(source).__name__.lower()
    assert not set(type(source).model_fields) & {"name", *Weighting.model_fields}
    for field_name, field in type(source).model_fields.items():
        assert field.description, f"{name}.{field_name} has no description"
    with pytest.raises(ConfigError, match="unknown key 'parameter_that_is_not_there'"):
        build(name, parameter_that_is_not_there=1)


@every_source
def test_one_finite_number_a_sample(name: str, build: Any) -> None:
    resources = Resources(scores_of=by_length, answers_of=grade)
    for count in (1, len(TEXTS)):
        numbers = list(build(name).score(given()[:count], resources))
        assert len(numbers) == count
        assert all(number is not None and math.isfinite(number) for number in numbers)


@every_source
def test_the_order_of_samples_does_not_matter(name: str, build: Any) -> None:
    resources = Resources(scores_of=by_length, answers_of=grade)
    straight = list(build(name).score(given(), resources))
    turned = list(build(name).score(given()[::-1], resources))
    assert turned[::-1] == pytest.approx(straight, rel=1e-12, abs=1e-12)


@every_source
def test_a_source_forgets(name: str, build: Any) -> None:
    resources = Resources(scores_of=by_length, answers_of=grade)
    source = build(name)
    first = list(source.score(given(), resources))
    source.score(given()[:2], resources)
    assert list(source.score(given(), resources)) == first


@every_source
def test_it_survives_being_written_down(name: str, build: Any) -> None:
    source = build(name)
    assert type(source).model_validate(source.model_dump(mode="json")) == source
