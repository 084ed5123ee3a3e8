"""PPO on a language model in the benchmark of learning: rows, kept pieces, verdicts, and all of it in small."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learns_language import Answers, Training, compare, language
from benchmarks.learns_language_models import NOTE, Preparation, kept
from benchmarks.learns_language_rows import HH_FILE, Sizes, choose_rows
from pipeline_lib.errors import DataError
from pipeline_lib.models.base import TINY

SMALL = Sizes(sft=12, reward=6, test=8, policy=10)


def test_no_group_of_functions_is_in_two_shares(tmp_path: Path) -> None:
    shares = vars(choose_rows("documentation", SMALL, folder=tmp_path, seed=3))
    groups = [{row.group for row in share} for share in shares.values()]
    assert [len(share) for share in shares.values()] == [12, 6, 6, 8, 10]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert {len(row.responses) for share in shares.values() for row in share} == {1}


def conversations(path: Path, count: int) -> None:
    rows = []
    for k in range(count):
        for more in ("", "\n\nAssistant: Why?\n\nHuman: Because."):  # one conversation, twice
            start = f"\n\nHuman: Question {k}?{more}\n\nAssistant:"
            rows.append({"chosen": f"{start} Yes, and more.", "rejected": f"{start} No."})
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def test_no_conversation_is_in_two_shares(tmp_path: Path) -> None:
    conversations(tmp_path / HH_FILE, 22)
    shares = vars(choose_rows("hh", SMALL, folder=tmp_path, seed=0))
    questions = [{row.messages[0].content for row in share} for share in shares.values()]
    assert [len(share) for share in shares.values()] == [12, 6, 6, 8, 10]
    assert sum(map(len, questions)) == len(set().union(*questions)) == 21
    assert {row.responses[0].content for share in shares.values() for row in share} == {"Yes, and more."}


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    conversations(tmp_path / HH_FILE, 16)
    with pytest.raises(DataError, match="32 rows are too few for 32 and some for the policy"):
        choose_rows("hh", SMALL, folder=tmp_path, seed=0)


def test_a_piece_is_made_once_and_one_that_was_cut_is_made_anew(tmp_path: Path) -> None:
    made = []

    def make(place: Path) -> dict[str, Any]:
        assert not list(place.iterdir())
        made.append(place.name)
        (place / "weights").write_text("new")
        if len(made) == 1:
            raise KeyboardInterrupt
        return {"figure": 3}

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "piece", make)
    assert not (tmp_path / "piece").exists()
    first, second = (kept(tmp_path / "piece", make) for _ in range(2))
    assert made == ["piece.unfinished"] * 2
    assert first == second == json.loads((tmp_path / "piece" / NOTE).read_bytes())
    assert first["about"] == {"figure": 3}
    assert first["spent"]["seconds"] >= 0


def answers(score: list[float], heldout: list[float], kl: float) -> Answers:
    finished = [k % 2 == 0 for k in range(len(score))]
    return Answers([(2, 3)] * len(score), {"proxy": score, "heldout": heldout}, [kl] * len(score), finished, 1.5)


@pytest.mark.parametrize(
    ("proxy", "heldout", "kl", "failed"),
    [
        (2.0, 0.1, 5.0, set()),
        (0.05, 0.1, 5.0, {"is_up_apart"}),
        (2.0, -0.1, 5.0, {"is_heldout_not_down"}),
        (2.0, 0.1, 10.5, {"is_near"}),
    ],
)
def test_the_verdicts(proxy: float, heldout: float, kl: float, failed: set[str]) -> None:
    noise = [(-1.0) ** k for k in range(40)]
    before = answers(noise, noise, 0.0)
    after = answers([one + proxy for one in noise], [one + heldout for one in noise], kl)
    found = compare(before, after)
    assert {name for name, holds in found["verdicts"].items() if not holds} == failed
    assert found["proxy"]["gain"]["value"] == pytest.approx(proxy, abs=1e-6)
    assert found["heldout"]["gain"]["low"] == pytest.approx(heldout, abs=1e-6), (
        "paired: the prompts' spread is not in it"
    )
    assert found["kl_nats"]["value"] == pytest.approx(kl)
    assert found["agreement"] == pytest.approx(1.0)
    assert (found["tokens_after"], found["finished_frac_after"], found["entropy_nats_after"]) == (2.0, 0.5, 1.5)


def test_all_of_it_with_a_tiny_model_and_again_from_what_was_kept(tmp_path: Path) -> None:
    plan = Preparation(
        base=TINY, sizes=Sizes(sft=4, reward=4, test=4, policy=6), scale_samples=4, max_prompt_tokens=32,
        max_new_tokens=6, reward_epochs=1,
    )  # fmt: skip
    training = Training(iterations=2, rollouts=4, minibatches=2, ppo_epochs=1, learning_rate=1e-3)
    first, second = (
        language(tmp_path, work=tmp_path / "work", plan=plan, training=training, rows_folder=tmp_path) for _ in range(2)
    )
    for found in (first, second):
        for name in ("measure_before", "ppo", "measure_after"):
            found["spent"].pop(name)
    assert first == second, "models are kept with the time they took, and PPO on them draws the same samples"
    assert [row["iteration"] for row in first["curve"]] == [0.0, 1.0]
    assert first["curve"][0]["ref_kl_nats"] == pytest.approx(0.0, abs=1e-4)
    assert first["kl_nats"]["value"] != 0
    assert all(
        math.isfinite(first[name][when]["value"]) for name in ("proxy", "heldout") for when in ("before", "gain")
    )
    assert len(first["samples"]) == 4
    assert first["samples"][0]["prompt"].isascii()
    assert first["spent"].keys() == {"base", "start", "answers", "proxy", "heldout"}
