"""A function of one's own: what it may do wrong is named with the row, and stays in its own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.errors import ConfigError, RewardError
from pipeline_lib.training.rewards import REWARD_SOURCES
from tests.unit.training.reward_samples import Heard, sample, samples, scored

MODULE = """
import os, sys

def length(rows, factor=1):
    print("this must not get between the answers")
    return [factor * len(row["response"]) for row in rows]

def odd(rows):
    given = {"nan": float("nan"), "none": None, "text": "x", "big": float("inf")}
    return [given.get(row["response"], 1) for row in rows]

def seen(rows):
    (row,) = rows
    assert row == {"id": "row", "prompt": [{"role": "user", "content": "Why?"}], "response": "So.",
                   "is_finished": True, "tags": ["safe"], "reference": "Because."}, row
    return [1]

def raises(rows):
    return [1 / (row["response"] != "bad") for row in rows]

def fewer(rows):
    return [1.0]

def drops(rows):
    return [1 for row in rows if row["response"] != "bad"]

def crashes(rows):
    for row in rows:
        if row["response"] == "bad":
            print("out of cheese", file=sys.stderr)
            os._exit(7)
    return [1] * len(rows)

def hangs(rows):
    for row in rows:
        while row["response"] == "bad":
            pass
    return [1] * len(rows)

def array(rows):
    return (len(row["response"]) for row in rows)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of reward functions that may be used."""
    path = tmp_path / "my_rewards.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PREFLINE_REWARD_FUNCTIONS", "other.module, my_rewards")
    return path


def spec(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": "function", "function": f"my_rewards:{name}", **parameters}


def test_it_gets_rows_and_parameters() -> None:
    assert scored(spec("length", parameters={"factor": 2}), samples("a", "", "abc")) == [2.0, 0.0, 6.0]
    assert scored(spec("array"), samples("a", "")) == [1.0, 0.0]
    assert scored(spec("seen"), [sample("So.", tags=("safe",), reference="Because.")]) == [1.0]
    assert scored(spec("length"), []) == []


def test_what_is_no_number_is_named_with_its_row() -> None:
    heard = Heard()
    found = scored(spec("odd"), samples("nan", "fine", "none", "text", "big"), heard.resources())
    assert found == [None, 1.0, None, None, None]
    assert heard.problems == [
        ("row0", "nan is not finite"), ("row2", "it returned None"), ("row3", "'x' is no number"),
        ("row4", "inf is not finite"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "ZeroDivisionError: division by zero at my_rewards.py:19"),
        ("drops", "it returned 0 numbers for 1 responses"),
        ("crashes", "its process ended with code 7: out of cheese"),
        ("hangs", "hung for 0.5 s at my_rewards.py:"),
    ],
)
def test_a_row_that_it_fails_on_is_found_and_the_others_are_scored(name: str, reason: str) -> None:
    heard = Heard()
    found = scored(spec(name, timeout_s=0.5), samples("good", "bad", "fine"), heard.resources())
    assert found == [1.0, None, 1.0]
    ((row, said),) = heard.problems
    assert row == "row1"
    assert said.startswith(reason)


def test_after_some_hangs_the_rest_is_not_tried() -> None:
    heard = Heard()
    found = scored(spec("crashes"), samples("good", "bad", "bad", "bad", "good", "good"), heard.resources())
    assert found == [1.0, None, None, None, None, None]
    assert heard.problems[-1] == ("row5", "not tried after 3 that hung or crashed")


def test_a_wrong_count_that_no_row_has_alone_stops_at_once() -> None:
    with pytest.raises(RewardError, match="my_rewards:fewer: it returned 1 numbers for 2 responses"):
        scored(spec("fewer"), samples("a", "b"))


def test_a_function_that_is_not_there() -> None:
    with pytest.raises(RewardError, match=r"my_rewards:lenght cannot be loaded: AttributeError"):
        scored(spec("lenght"), samples("a"))


def test_only_allowed_functions_are_imported(monkeypatch: pytest.MonkeyPatch, module: Path) -> None:
    marker = module.with_name("imported")
    module.write_text(f"open({str(marker)!r}, 'w').close()\ndef one(rows): return [1] * len(rows)\n")
    for allowed in ("", "my_reward", "my_rewards:other", "my_rewards.deeper"):
        monkeypatch.setenv("PREFLINE_REWARD_FUNCTIONS", allowed)
        with pytest.raises(ConfigError, match="not on the list") as caught:
            scored(spec("one"), samples("a"))
        assert "export PREFLINE_REWARD_FUNCTIONS=my_rewards" in caught.value.next_step
        with pytest.raises(ConfigError, match="not on the list"):
            REWARD_SOURCES.build(spec("one")).fingerprints()
    assert not marker.exists()
    monkeypatch.setenv("PREFLINE_REWARD_FUNCTIONS", "my_rewards:one")
    assert scored(spec("one"), samples("a")) == [1.0]


def test_another_text_of_the_module_is_another_fingerprint(module: Path) -> None:
    source = REWARD_SOURCES.build(spec("length"))
    first = source.fingerprints()
    assert list(first) == ["my_rewards"]
    module.write_text(MODULE + "# changed\n")
    assert source.fingerprints() != first


def test_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLINE_REWARD_FUNCTIONS", "nowhere.at_all")
    with pytest.raises(ConfigError, match=r"'nowhere.at_all' of a reward function is not found"):
        REWARD_SOURCES.build({"name": "function", "function": "nowhere.at_all:f"}).fingerprints()


@pytest.mark.parametrize("place", ["os", "os.system", ":f", "os:system(1)", "__import__('os'):system"])
def test_a_place_that_is_none_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="function"):
        REWARD_SOURCES.build({"name": "function", "function": place})
