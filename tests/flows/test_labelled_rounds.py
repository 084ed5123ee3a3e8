"""Iterated DPO and SDF whole, with a tiny model: the reward model, a judge and people label, and runs go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.candidates import Material, train_candidates
from pipeline_lib.errors import JudgeError, LabelsWantedError
from pipeline_lib.models.tiny import byte_tokenizer, write_tiny_model
from pipeline_lib.schema import ArtifactRef, Record, Split
from pipeline_lib.stages.execute import Job, run_here
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit
from tests.toy import record, write_reward_model
from tests.unit.training.judge_server import comparing, endpoint, ordering, saying
from tests.unit.training.reward_server import Scorer, scorer, status

__all__ = ["scorer"]
pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

TEXTS = ("a", "what?", "tell me", "why")
SMALL: dict[str, Any] = {
    "batch_size": 4, "precision": "fp32", "max_prompt_tokens": 64, "max_response_tokens": 16,
    "adapter": {"name": "lora", "rank": 2}, "optimizer": {"learning_rate": 1e-3},
    "sampling": {"samples_per_prompt": 3, "max_new_tokens": 6, "missing_eos": "keep"},
}  # fmt: skip


class Runner:
    """Runs stages in this process, and each only where its key has no result: what the tasks do, without Prefect."""

    def __init__(self, store: ArtifactStore, home: Path) -> None:
        self.store, self.home = store, home
        self.services = SimpleNamespace(store=store)
        self.run: list[str] = []
        self.made: dict[str, ArtifactRef] = {}

    def named(self, name: str, stage: str, config: Any, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
        job = Job(
            stage=stage, config=config.model_dump(mode="json"), inputs=inputs, storage=self.store.settings,
            home=self.home,
        )  # fmt: skip
        found = self.store.find(job.key)
        if found is None:
            self.run.append(name)
            found = run_here(job, store=self.store, events=Told(), should_stop=lambda: False)
        self.made[name] = found
        return found

    def together(self, jobs: Mapping[str, tuple[str, Any, dict[str, ArtifactRef]]]) -> dict[str, ArtifactRef]:
        return {name: self.named(name, *job) for name, job in jobs.items()}


class World:
    """A tiny model, a reward model and prompts in a store, and runs of one candidate over them."""

    def __init__(self, store: ArtifactStore, root: Path) -> None:
        self.store, self.root = store, root
        write_tiny_model(root / "sft" / "model", seed=0)
        write_reward_model(root / "sft" / "model", root / "reward" / "model")
        byte_tokenizer().save_pretrained(root / "reward" / "model")
        (root / "reward" / "normalization.json").write_text(json.dumps({"gain": 1.0, "bias": 0.0}))
        (root / "dataset").mkdir()
        for split in Split:
            rows = [record(text, "yes", "no").model_copy(update={"split": split}) for text in TEXTS]
            lines = "".join(row.model_dump_json() + "\n" for row in rows)
            (root / "dataset" / f"{split.value}.jsonl").write_text(lines)
        kinds = {"sft": "model", "reward": "reward_model", "dataset": "dataset"}
        sft, reward, dataset = (commit(store, root / name, kind) for name, kind in kinds.items())
        self.material = Material(base=sft, sft=sft, reward=reward, dataset=dataset)
        self.runner = Runner(store, root / "home")

    def train(self, method: str, labels: dict[str, Any] | None, **changes: Any) -> ArtifactRef:
        candidate = {"method": method, **SMALL, **changes, **({} if labels is None else {"labels": labels})}
        config = validate(RunConfig, {"dpo": None, "ppo": None, "candidates": {"c": candidate}}, where="test")
        self.runner.run = []
        return train_candidates(config, self.runner, self.material)["c"]  # type: ignore[arg-type]

    def rows(self, name: str, split: Split) -> list[Record]:
        lines = self.store.read_lines(self.runner.made[name], f"{split.value}.jsonl")
        return [Record.model_validate_json(line) for line in lines]


@pytest.fixture
def world(store: ArtifactStore, tmp_path: Path) -> World:
    return World(store, tmp_path)


def test_without_a_word_the_reward_model_labels(world: World) -> None:
    model = world.train("iterated_dpo", None, rounds=1)
    assert world.runner.run == ["c:round-1:rollouts", "c:round-1:reference_logps", "c:round-1:preference"]
    assert world.train("iterated_dpo", {"name": "reward_model"}, rounds=1) == model
    assert world.runner.run == []


def test_a_judge_labels_the_rounds_of_iterated_dpo(world: World, scorer: Scorer) -> None:
    scorer.otherwise = saying(comparing(str))
    judge = {"name": "judge", "endpoint": endpoint(scorer, at_once=1)}
    scorer.answers = [saying(comparing(str))] * 5 + [status(403)]
    with pytest.raises(JudgeError):
        world.train("iterated_dpo", judge, rounds=2)
    assert world.runner.run == ["c:round-1:rollouts", "c:round-1:labels"]
    model = world.train("iterated_dpo", judge, rounds=2)
    assert world.runner.run[0] == "c:round-1:labels", "the round goes on where it was"
    assert world.runner.run[-1] == "c:round-2:preference"
    questions = [body["messages"][0]["content"] for _, body in scorer.asked]
    assert len(questions) - len(set(questions)) == 1, "only the question that was refused is asked again"
    for number in (1, 2):
        for row in world.rows(f"c:round-{number}:labels", Split.POLICY):
            texts = [response.content for response in row.responses]
            assert row.ranks in ((), (1, 2))
            assert texts == sorted(texts, reverse=True)
    assert world.train("iterated_dpo", judge, rounds=2) == model
    assert world.runner.run == []


def test_people_label_the_rounds_of_iterated_dpo(world: World, tmp_path: Path) -> None:
    people = {"name": "people", "directory": str(tmp_path / "labels")}
    for number in (1, 2):
        with pytest.raises(LabelsWantedError):
            world.train("iterated_dpo", people, rounds=2)
        assert world.runner.run[-1] == f"c:round-{number}:labels"
        (path,) = (tmp_path / "labels").glob(f"c-round-{number}-*.jsonl")
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        for row in rows:
            texts = sorted(row["responses"])
            row["ranks"] = [1 + texts.index(text) for text in row["responses"]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.train("iterated_dpo", people, rounds=2)
    assert world.runner.run == ["c:round-2:labels", "c:round-2:reference_logps", "c:round-2:preference"]
    for row in world.rows("c:round-2:labels", Split.POLICY):
        texts = [response.content.replace("\0", "\ufffd") for response in row.responses]  # as people saw them
        assert texts == sorted(texts)


def test_a_judge_ranks_the_samples_of_sdf_as_baize_has_it(world: World, scorer: Scorer) -> None:
    scorer.otherwise = saying(ordering(str))
    judge = {"name": "judge", "form": "rank", "endpoint": endpoint(scorer)}
    world.train("sdf", judge)
    assert world.runner.run == ["c:round-1:rollouts", "c:round-1:labels", "c:round-1:sft"]
    drawn = map(json.loads, world.store.read_lines(world.runner.made["c:round-1:rollouts"], "samples.jsonl"))
    samples = {
        each["prompt"]["id"]: [one["content"] for one in each["responses"] if one["is_usable"]] for each in drawn
    }
    best = {row.messages: row.responses[0].content for row in world.rows("c:round-1:labels", Split.SFT)}
    assert len(best) == len(TEXTS)
    for text in TEXTS:
        prompt = record(text).model_copy(update={"split": Split.POLICY})
        assert best[prompt.messages] == max(samples[prompt.id])
