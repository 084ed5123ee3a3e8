"""The stage `gate` on a real store: evidence comes from evaluation artifacts, the verdict is a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.schema import ArtifactRef, Verdict
from pipeline_lib.stages import gate
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import validate
from tests.golden.check_gate import example, model
from tests.stage_bench import commit, context_in, write_files

pytestmark = pytest.mark.servers

CONFIG = validate(
    gate.GateConfig,
    {
        "candidates": ["dpo"],
        "policy": {
            "rules": [
                {"metric": {"name": "score", "against": "champion"}, "at_least": 0.5},
                {"metric": {"name": "reward_model_accuracy"}, "at_least": 0.5},
            ]
        },
    },
    where="the test",
)


Evaluate = Callable[..., ArtifactRef]


@pytest.fixture
def context(store: ArtifactStore, tmp_path: Path) -> StageContext:
    return context_in(tmp_path / "run", store)


def evaluation(store: ArtifactStore, directory: Path, name: str, score: float, num: int = 20) -> ArtifactRef:
    directory.mkdir(parents=True)
    lines = [example(number, score=score).model_dump_json() for number in range(num)]
    (directory / "examples.jsonl").write_text("\n".join(lines) + "\n")
    return commit(store, directory, "evaluation", stage="evaluate", inputs={"model": model(name)})


@pytest.fixture
def judge(store: ArtifactStore, tmp_path: Path) -> ArtifactRef:
    folder = write_files(tmp_path / "judge", {"about.txt": b"anything"})
    return commit(store, folder, "reward_model", metrics={"test_accuracy_frac": 0.9, "test_pairs": 100.0})


def test_the_verdict_names_models_by_their_artifacts(context: StageContext, judge: ArtifactRef, tmp_path: Path) -> None:
    inputs = {
        "reward_model": judge,
        "evaluation:dpo": evaluation(context.store, tmp_path / "dpo", "dpo", 1.0),
        "evaluation:champion": evaluation(context.store, tmp_path / "champion", "old", 0.0),
    }
    output = gate.run(CONFIG, inputs, context)
    verdict = Verdict.model_validate_json((context.workdir / "verdict.json").read_text())
    assert (output.kind, output.metrics) == ("verdict", {"passed": 1.0})
    assert verdict.winner == "dpo"
    assert verdict.candidate("dpo").model == model("dpo")
    assert verdict.champion == model("old")
    assert [rule.status for rule in verdict.candidate("dpo").rules] == ["pass", "pass"]


def test_without_a_champion_its_rule_does_not_apply(context: StageContext, judge: ArtifactRef, tmp_path: Path) -> None:
    inputs = {"reward_model": judge, "evaluation:dpo": evaluation(context.store, tmp_path / "dpo", "dpo", 1.0)}
    gate.run(CONFIG, inputs, context)
    verdict = Verdict.model_validate_json((context.workdir / "verdict.json").read_text())
    assert [rule.status for rule in verdict.candidate("dpo").rules] == ["not_applicable", "pass"]
    assert (verdict.winner, verdict.champion) == ("dpo", None)


def test_what_was_not_evaluated_is_refused(context: StageContext, judge: ArtifactRef, tmp_path: Path) -> None:
    inputs = {"reward_model": judge, "evaluation:sft": evaluation(context.store, tmp_path / "sft", "sft", 1.0)}
    with pytest.raises(ConfigError, match=r"\['dpo'\], which were not evaluated"):
        gate.run(CONFIG, inputs, context)


def test_other_prompts_are_refused(context: StageContext, judge: ArtifactRef, tmp_path: Path) -> None:
    inputs = {
        "reward_model": judge,
        "evaluation:dpo": evaluation(context.store, tmp_path / "dpo", "dpo", 1.0),
        "evaluation:champion": evaluation(context.store, tmp_path / "champion", "old", 0.0, num=19),
    }
    with pytest.raises(DataError, match="evaluated on different prompts"):
        gate.run(CONFIG, inputs, context)
