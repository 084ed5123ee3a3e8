"""Every preference loss through the loop: it learns, resumes to the bit, and does not feel how a step is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.errors import InterruptedRunError
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.schema import Record
from tests.toy import ANSWERS, World, furthest, preference_recipe, record, settings, stop_before, weights_of

LOSSES: list[dict[str, Any]] = [
    *({"name": name} for name in PREFERENCE_LOSSES),
    {"name": "dpo", "label_smoothing": 0.2, "sft_coef": 0.5}, {"name": "ipo", "reduction": "mean"},
    {"name": "slic", "kind": "list"}, {"name": "slic", "kind": "rank", "reg": "kl"},
]  # fmt: skip
IDS = ["-".join(str(value) for value in loss.values()) for loss in LOSSES]


def ranked(number: int, answer: str) -> Record:
    """Three answers with scores, and, of every other row, two that tie."""
    row = record(f"question {number}", answer, answer[::-1] + "?", "no", ranks=(1, 2, 2) if number % 2 else (1, 2, 3))
    scores = (3.0, 1.0, 1.0) if number % 2 else (3.0, 1.0, 0.0)
    responses = tuple(
        response.model_copy(update={"score": score}) for response, score in zip(row.responses, scores, strict=True)
    )
    return row.model_copy(update={"responses": responses, "weight": 1.0 + number % 3})


ROWS = [ranked(number, answer) for number, answer in enumerate(ANSWERS)]


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_it_learns(loss: dict[str, Any], directory: Path, world: World) -> None:
    chosen = settings(batch_size=8, epochs=12, optimizer={"learning_rate": 5e-3})
    series = world.loop(preference_recipe(directory, chosen, loss, ROWS), chosen).run()
    assert series[-1]["loss"] < series[0]["loss"]
    assert series[-1]["accuracy_frac"] >= 0.6


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_resumed_three_times_it_ends_with_the_same_bits(loss: dict[str, Any], directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=3, epochs=2)
    whole = preference_recipe(directory, chosen, loss, ROWS)
    series = World.at(tmp_path / "whole").loop(whole, chosen).run()
    world = World.at(tmp_path / "cut")
    for step in (1, 3, 5):  # the middle and the end of an epoch, and the last step
        loop = world.loop(preference_recipe(directory, chosen, loss, ROWS), chosen)
        world.should_stop = stop_before(step, loop)
        with pytest.raises(InterruptedRunError):
            loop.run()
    world.should_stop = lambda: False
    resumed = preference_recipe(directory, chosen, loss, ROWS)
    assert world.loop(resumed, chosen).run() == series
    assert furthest(weights_of(resumed), weights_of(whole)) == 0.0


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_one_forward_of_eight_is_eight_of_one(loss: dict[str, Any], directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=8, epochs=2, optimizer={"epsilon": 1e-5})
    found = []
    for tokens, is_packed in ((4096, True), (16, True), (4096, False)):
        recipe = preference_recipe(directory, chosen, loss, ROWS, tokens_per_batch=tokens, is_packed=is_packed)
        World.at(tmp_path / f"{tokens}-{is_packed}").loop(recipe, chosen).run()
        found.append(weights_of(recipe))
    assert furthest(found[0], found[1]) <= 1e-5
    assert furthest(found[0], found[2]) <= 1e-5


def test_unpaired_rows_need_no_partner(directory: Path, world: World) -> None:
    rows = [
        record(f"question {number}", text).model_copy(update={"desirable": number % 2 == 0})
        for number, text in enumerate(ANSWERS)
    ]
    chosen = settings(batch_size=8, epochs=10, optimizer={"learning_rate": 5e-3})
    recipe = preference_recipe(directory, chosen, {"name": "kto"}, rows)
    series = world.loop(recipe, chosen).run()
    # 1 - sigma(0) = 1/2 for every response while the policy is its reference
    assert series[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert series[-1]["loss"] < 0.45
    assert series[-1]["kl_reference_point_nats"] >= 0.0
