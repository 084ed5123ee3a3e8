"""Rounds of the whole loop: what each starts from, and that finished rounds are not run again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import iterate as module
from pipeline_lib.errors import ConfigError
from pipeline_lib.schema import ArtifactRef, CandidateVerdict, Verdict
from pipeline_lib.stages.iterate import IterateConfig, RoundStart, config_of_round, model_of_next_round
from pipeline_lib.stages.lineage import walk
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import validate


def config(**section: Any) -> RunConfig:
    return validate(RunConfig, {"name": "test", "iterate": section}, where="test")


def candidate(name: str, model: ArtifactRef, *, passed: bool, rank: float | None) -> CandidateVerdict:
    return CandidateVerdict(name=name, model=model, is_passed=passed, rules=(), rank_value=rank)


class Loop:
    """Stands for the flow `align`: makes an artifact a round, and says what promotion did."""

    def __init__(self, store: ArtifactStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.root = store, root
        self.starts: list[RoundStart] = []
        self.passes = True

        @contextmanager
        def opened(home: Path) -> Iterator[tuple[None, ArtifactStore]]:
            yield None, store

        monkeypatch.setattr(module, "open_store", opened)
        monkeypatch.setattr(module, "align", self.align)
        monkeypatch.setattr(module, "create_markdown_artifact", lambda *_, **__: None)

    def put(self, name: str) -> ArtifactRef:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name.txt").write_text(name)
        return self.store.commit(
            folder, kind="model", stage="test", stage_version=1, config={}, inputs={}, metrics={}, measurements={},
            stage_key=None,
        )  # fmt: skip

    def align(self, config: RunConfig, start: RoundStart) -> Any:
        self.starts.append(start)
        model, reward = self.put(f"dpo-{start.number}-{config.sft.seed}"), self.put(f"reward-{start.number}")
        verdict = Verdict(
            candidates=(candidate("dpo", model, passed=self.passes, rank=1.0),),
            winner="dpo" if self.passes else None, champion=start.model, policy={},
        )  # fmt: skip
        status = "promoted" if self.passes else "rejected"
        promotion = SimpleNamespace(status=status, model=model if self.passes else None, reason="because")
        return SimpleNamespace(
            promotion=promotion, verdict=verdict, artifacts={"reward_model": reward, "candidate:dpo": model}
        )

    def run(self, config: RunConfig, rounds: int) -> list[Any]:
        self.starts.clear()
        return module.iterate.fn(config, rounds)


@pytest.fixture
def loop(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(store, tmp_path / "models", monkeypatch)


@pytest.mark.servers
def test_each_round_starts_from_the_champion_of_those_before(loop: Loop) -> None:
    results = loop.run(config(), 3)
    assert [start.number for start in loop.starts] == [1, 2, 3]
    assert loop.starts[0].model is None
    assert loop.starts[1].model == results[0].model == results[0].artifacts["candidate:dpo"]
    assert loop.starts[2].reward_model == results[1].artifacts["reward_model"]
    assert len({result.model for result in results}) == 3


@pytest.mark.servers
def test_finished_rounds_are_not_run_again_and_more_may_follow(loop: Loop) -> None:
    first = loop.run(config(), 2)
    assert loop.run(config(), 2) == first
    assert loop.starts == []
    loop.run(config(), 3)
    assert [start.number for start in loop.starts] == [3]
    # What later rounds change may be written while the first ones are done.
    loop.run(config(changes=[{}, {"sft.seed": 7}]), 3)
    assert [start.number for start in loop.starts] == [3]


@pytest.mark.servers
def test_a_round_is_an_artifact_with_its_lineage(loop: Loop) -> None:
    results = loop.run(config(), 1)
    (ref,) = [ref for ref in loop.store.list_artifacts() if ref.kind == "round"]
    assert {found for found, _ in walk(loop.store, ref)} == {ref, *results[0].artifacts.values()}


@pytest.mark.servers
def test_without_a_champion_the_next_round_starts_from_the_base_model_or_the_best_candidate(loop: Loop) -> None:
    loop.passes = False
    results = loop.run(config(), 2)
    assert [start.model for start in loop.starts] == [None, None]
    assert [result.status for result in results] == ["rejected", "rejected"]
    loop.run(config(start_from="last_candidate"), 2)
    assert loop.starts[1].model is not None


def test_the_last_candidate_is_the_winner_else_the_best_by_the_gates_order() -> None:
    models = [ArtifactRef(kind="model", id=f"{digit}" * 64) for digit in (1, 2, 3)]
    candidates = tuple(
        candidate(f"c{n}", model, passed=n == 1, rank=rank)
        for n, (model, rank) in enumerate(zip(models, (0.5, 0.2, None), strict=True))
    )
    schedule = IterateConfig(start_from="last_candidate")
    for winner, best in (("c1", models[1]), (None, models[0])):
        verdict = Verdict(candidates=candidates, winner=winner, champion=None, policy={})
        assert model_of_next_round(schedule, verdict, RoundStart(), None) == best
    verdict = Verdict(candidates=candidates[2:], winner=None, champion=None, policy={})
    assert model_of_next_round(schedule, verdict, RoundStart(), None) == models[2]


def test_changes_hold_from_their_round_on() -> None:
    changing = config(changes=[{"sft.seed": 1}, {"sft.seed": 2, "dpo.loss.beta": 0.5}])
    assert [config_of_round(changing, number).sft.seed for number in (1, 2, 3, 4)] == [0, 1, 2, 2]
    assert config_of_round(changing, 3).dpo.loss["beta"] == 0.5  # type: ignore[union-attr]
    assert config_of_round(config(), 5) == config()


@pytest.mark.parametrize(
    "key", ["filter.split.seed", "filter", "filter.split", "promote.model_name", "promote", "name", "runtime.home"]
)
def test_no_round_changes_what_rounds_are_compared_by(key: str) -> None:
    with pytest.raises(ConfigError, match="is the same in all rounds"):
        config(changes=[{key: 1}])


@pytest.mark.parametrize(("changes", "words"), [({"sft.batch_sise": 3}, "batch_size"), ({"sft.epochs": 0}, "epochs")])
def test_a_change_that_does_not_fit_is_refused_before_anything_runs(
    loop: Loop, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        loop.run(config(changes=[changes]), 2)
    assert loop.starts == []
