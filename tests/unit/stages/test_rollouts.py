"""Stage `rollouts` on a real store: what it draws, what it makes of it, and that it goes on after a stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.errors import DataError, IntegrityError, InterruptedRunError, RewardError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.heads import load_scalar_model
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import response_scores
from pipeline_lib.models.tiny import byte_tokenizer, write_tiny_model
from pipeline_lib.schema import ArtifactRef, Record, Split
from pipeline_lib.stages import rollout_parts, rollouts
from pipeline_lib.stages.rollout_rows import SampledPrompt
from pipeline_lib.stages.rollouts import RolloutsConfig, prompts_of_round
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.text.encode import Tree
from pipeline_lib.training import reward_set
from tests.stage_bench import Told, commit, context_in, write_files
from tests.toy import chat, encoder, layout, record, write_reward_model

TEXTS = ("a", "what?", "tell me", "why", "hello you", "x", "and", "?")
CONFIG = RolloutsConfig(
    samples_per_prompt=3, max_new_tokens=6, batch_size=6, precision="fp32", missing_eos="keep", max_prompt_tokens=256
)


@dataclass
class World:
    """A store with a model, a reward model and a data set, and runs of the stage over them."""

    store: ArtifactStore
    root: Path
    model: ArtifactRef = field(init=False)
    reward_model: ArtifactRef = field(init=False)
    dataset: ArtifactRef = field(init=False)
    told: Told = field(default_factory=Told)
    count: int = 0
    parts_drawn: int = 0

    def put(self, kind: str, files: Mapping[str, bytes], **inputs: ArtifactRef) -> ArtifactRef:
        self.count += 1
        return commit(self.store, write_files(self.root / f"put-{self.count}", files), kind, inputs=inputs)

    def run(
        self, config: RolloutsConfig, *, stop_after: int | None = None, **inputs: ArtifactRef
    ) -> tuple[Path, dict[str, float | None]]:
        """Run the stage; `stop_after` counts the questions whether to stop that are answered with no."""
        self.count += 1
        asked = iter(range(10**6 if stop_after is None else stop_after))
        context = context_in(self.root / f"run-{self.count}", self.store, told=self.told, key=f"{self.count:064d}")
        context = replace(context, should_stop=lambda: next(asked, None) is None)
        given = {"model": self.model, "reward_model": self.reward_model, "dataset": self.dataset, **inputs}
        self.parts_drawn = 0
        output = rollouts.run(config, given, context)
        assert output.kind == "dataset"
        return output.directory, output.metrics


def model_files(directory: Path) -> dict[str, bytes]:
    return {f"model/{path.name}": path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def world(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(store, tmp_path)
    write_tiny_model(tmp_path / "model", seed=0)
    write_reward_model(tmp_path / "model", tmp_path / "reward")
    byte_tokenizer().save_pretrained(tmp_path / "reward")
    made.model = made.put("model", model_files(tmp_path / "model"))
    scale = json.dumps({"gain": 2.0, "bias": 0.5}).encode()
    made.reward_model = made.put("reward_model", {**model_files(tmp_path / "reward"), "normalization.json": scale})
    rows = {split: [record(f"{split.value} {n}", "yes", "no") for n in range(2)] for split in Split}
    rows[Split.POLICY] = [record(text, "good", "bad") for text in TEXTS] + [record("a", "another answer")]
    placed = {split: [row.model_copy(update={"split": split}) for row in each] for split, each in rows.items()}
    made.dataset = made.put(
        "dataset",
        {f"{split.value}.jsonl": "".join(row.model_dump_json() + "\n" for row in each).encode()
         for split, each in placed.items()},
    )  # fmt: skip
    monkeypatch.setattr(rollouts, "_PROMPTS_PER_PART", 3)
    draw = rollout_parts.Sampler.draw

    def counted(self: rollout_parts.Sampler, *args: Any, **kwargs: Any) -> Any:
        made.parts_drawn += 1
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(rollout_parts.Sampler, "draw", counted)
    return made


def records(directory: Path, split: Split) -> list[Record]:
    lines = (directory / f"{split.value}.jsonl").read_bytes().split(b"\n")
    return [Record.model_validate_json(line) for line in lines if line]


def samples(directory: Path) -> list[SampledPrompt]:
    lines = (directory / "samples.jsonl").read_bytes().split(b"\n")
    return [SampledPrompt.model_validate_json(line) for line in lines if line]


@pytest.mark.servers
def test_rows_hold_the_models_own_responses_as_the_reward_model_ranks_them(world: World, tmp_path: Path) -> None:
    directory, metrics = world.run(CONFIG)
    drawn = samples(directory)
    assert sorted(each.prompt.messages[0].content for each in drawn) == sorted(TEXTS)
    assert {len(each.responses) for each in drawn} == {3}

    # The first part again, by the functions that have tests of their own.
    part = [each.prompt for each in drawn[:3]]
    prompt_ids = [encoder().prompt(each.messages, where="test")[0] for each in part]
    again = sample(
        load_causal_model(tmp_path / "model", dtype=torch.float32),
        [ids for ids in prompt_ids for _ in range(3)], SamplingSettings(max_new_tokens=6),
        eos_id=chat().eos_id, pad_id=chat().pad_id, seed=derive_seed(0, "rollouts", 1, part[0].id),
    )  # fmt: skip
    reward_model = load_scalar_model(tmp_path / "reward", dtype=torch.float32).eval()
    for place, each in enumerate(drawn[:3]):
        ids = tuple(prompt_ids[place])
        own = again[3 * place : 3 * place + 3]
        tree = Tree("r", ids, tuple(one.ids for one in own), (False,) * len(ids))
        raw = response_scores(reward_model, [tree], layout())["r"]
        assert [one.content for one in each.responses] == [chat().decode(list(one.ids)) for one in own]
        assert [one.score for one in each.responses] == pytest.approx([2.0 * score + 0.5 for score in raw], abs=1e-4)

    for row, each in zip(records(directory, Split.POLICY), drawn, strict=True):
        assert [one.score for one in row.responses] == [one.score for one in each.candidates()]
        assert row.split is Split.POLICY
    author = records(directory, Split.POLICY)[0].responses[0].author
    assert (author.kind, author.name) == ("model", str(world.model))
    assert author.sampling["temperature"] == 1.0
    demonstrated = records(directory, Split.SFT)
    assert [row.responses[0].score for row in demonstrated] == [each.candidates()[0].score for each in drawn]
    assert metrics["prompts"] == metrics["demonstrations"] == len(TEXTS)


@pytest.mark.servers
def test_other_splits_are_copied_bit_by_bit(world: World) -> None:
    directory, _ = world.run(CONFIG)
    for split in (Split.REWARD, Split.REWARD_TEST, Split.GATE):
        name = f"{split.value}.jsonl"
        assert (directory / name).read_bytes() == world.store.open_bytes(world.dataset, name)


@pytest.mark.servers
def test_figures_are_those_of_the_samples(world: World) -> None:
    directory, metrics = world.run(CONFIG)
    drawn = samples(directory)
    scores = [[one.score for one in each.responses] for each in drawn]
    everything = [score for row in scores for score in row]
    assert metrics["score"] == pytest.approx(sum(everything) / len(everything), abs=1e-12)
    assert metrics["best_of_k_score"] == pytest.approx(sum(map(max, scores)) / len(scores), abs=1e-12)
    figures = json.loads((directory / "figures.json").read_text())
    pairs = [max(row[i], row[j]) for row in scores for i, j in ((0, 1), (0, 2), (1, 2))]
    curve = {point["n"]: point["score"] for point in figures["best_of_n"]}
    assert curve[2] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    told = {step: found["rollouts/best_of_n_score"] for step, found in world.told.figures if len(found) == 1}
    assert told == curve
    ended = [one.is_finished for each in drawn for one in each.responses]
    assert figures["finished_frac"] == pytest.approx(sum(ended) / len(ended))


@pytest.mark.servers
def test_a_pass_that_is_stopped_goes_on_after_its_last_part_with_the_same_rows(world: World) -> None:
    with pytest.raises(InterruptedRunError, match="after 3 of 8 prompts"):
        world.run(CONFIG, stop_after=1)
    assert world.parts_drawn == 1
    directory, _ = world.run(CONFIG)
    assert world.parts_drawn == 2
    assert world.told.lines == ["1 of 3 parts were there already"]

    # What is made of the responses is no part of the key: rows are made anew, nothing is sampled.
    other = CONFIG.model_copy(update={"select": "top_share", "compared": "best_and_worst", "missing_eos": "penalty"})
    world.run(other)
    assert world.parts_drawn == 0
    warmer, _ = world.run(CONFIG.model_copy(update={"temperature": 1.5}))
    assert world.parts_drawn == 3
    assert samples(warmer) != samples(directory)


@pytest.mark.servers
def test_a_response_that_did_not_end_gets_its_rule(world: World) -> None:
    kept = samples(world.run(CONFIG)[0])
    replaced = samples(world.run(CONFIG.model_copy(update={"missing_eos": "replace", "missing_eos_value": -7.0}))[0])
    lowered = samples(world.run(CONFIG.model_copy(update={"missing_eos": "penalty", "missing_eos_value": -2.0}))[0])
    found = 0
    for before, after, less in zip(kept, replaced, lowered, strict=True):
        for one, two, three in zip(before.responses, after.responses, less.responses, strict=True):
            if one.is_finished:
                assert one.score == two.score == three.score
            else:
                found += 1
                assert two.score == -7.0
                assert three.score == pytest.approx(one.score - 2.0, abs=1e-12)
    assert found > 0


@pytest.mark.servers
def test_with_earlier_rounds_the_best_is_taken_over_all(world: World) -> None:
    config = CONFIG.model_copy(update={"prompts": 5})
    first, _ = world.run(config)
    inputs = {"model": world.model, "reward_model": world.reward_model, "dataset": world.dataset}
    kept = world.put("dataset", {path.name: path.read_bytes() for path in first.iterdir()}, **inputs)
    second, metrics = world.run(config.model_copy(update={"round": 2}), earlier=kept)
    assert metrics["prompts"] == 5
    assert metrics["demonstrations"] == len(TEXTS)  # 5 prompts, then the other 3 and 2 again
    by_id = {each.prompt.id: each for each in samples(second)}
    twice = [each for each in by_id.values() if len(each.responses) == 6]
    assert len(twice) == 2
    for each in samples(first):
        assert by_id[each.prompt.id].responses[:3] == each.responses
    for each in twice:
        assert {one.author.sampling["round"] for one in each.responses} == {1, 2}


@pytest.mark.servers
def test_scores_of_two_reward_models_are_not_mixed(world: World) -> None:
    inputs = {"model": world.model, "reward_model": world.model, "dataset": world.dataset}
    kept = world.put("dataset", {"samples.jsonl": b""}, **inputs)
    with pytest.raises(IntegrityError, match="earlier rollouts were scored by model/"):
        world.run(CONFIG, earlier=kept)


@pytest.mark.servers
def test_a_score_that_is_no_number_is_named_with_its_row(world: World, tmp_path: Path) -> None:
    broken = load_scalar_model(tmp_path / "reward", dtype=torch.float32)
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    byte_tokenizer().save_pretrained(tmp_path / "broken")
    scale = json.dumps({"gain": 1.0, "bias": 0.0}).encode()
    world.reward_model = world.put("reward_model", {**model_files(tmp_path / "broken"), "normalization.json": scale})
    with pytest.raises(DataError, match=r"row [0-9a-f]{12} \(toy.jsonl:7\): the reward model gave 3 of 3 .* nan"):
        world.run(CONFIG)


def test_rounds_go_through_all_prompts_and_then_begin_anew() -> None:
    rows = [record(text, "yes", "no") for text in TEXTS] + [record("a", "again")]
    configs = [CONFIG.model_copy(update={"prompts": 4, "round": number}) for number in (1, 2, 3)]
    rounds = [[each.messages[0].content for each in prompts_of_round(rows, config)] for config in configs]
    assert sorted(rounds[0] + rounds[1]) == sorted(TEXTS)
    assert rounds[2] == rounds[0]
    assert all(each.kind == "prompt" for each in prompts_of_round(rows, CONFIG))
    assert len(prompts_of_round(rows, CONFIG)) == len(TEXTS)
    shuffled = prompts_of_round(rows[::-1], CONFIG)
    assert {each.id for each in shuffled} == {each.id for each in prompts_of_round(rows, CONFIG)}


def rewarded(**changes: Any) -> RolloutsConfig:
    """The same round with rewards: a wanted length, and a little of the reward model."""
    parts = [
        {"name": "length", "target": 3, "unit": "tokens"},
        {"name": "reward_model", "weight": 0.25, "normalize": "running"},
    ]
    return RolloutsConfig.model_validate({**CONFIG.model_dump(), "rewards": {"parts": parts, **changes}})


@pytest.mark.servers
def test_a_set_of_rewards_ranks_the_responses_that_are_there_already(world: World) -> None:
    plain = {each.prompt.id: each for each in samples(world.run(CONFIG)[0])}
    directory, _ = world.run(rewarded())
    assert world.parts_drawn == 0, "the rewards change no response"
    raw = torch.tensor([(one.score - 0.5) / 2.0 for each in plain.values() for one in each.responses]).double()
    model = (2.0 * raw + 0.5 - (2.0 * raw + 0.5).mean()) / (2.0 * raw).std(unbiased=False)
    expected = iter(model.tolist())
    for each in samples(directory):
        before = plain[each.prompt.id]
        assert [one.content for one in each.responses] == [one.content for one in before.responses]
        # Each token beyond the target costs a third, down to 0; the end-of-turn token is none.
        lengths = [max(0.0, 1 - abs(one.num_tokens - one.is_finished - 3) / 3) for one in each.responses]
        own = [length + 0.25 * next(expected) for length in lengths]
        assert [one.score for one in each.responses] == pytest.approx(own, abs=1e-4)
    assert world.told.series("rollouts/reward/scored_frac")[-1] == 1.0
    mean = float((2 * raw + 0.5).mean())
    assert world.told.series("rollouts/reward/reward_model")[-1] == pytest.approx(mean, abs=1e-4)
    for row in records(directory, Split.SFT):
        ranked = next(each for each in samples(directory) if each.prompt.messages == row.messages)
        assert row.responses[0].content == ranked.candidates()[0].content


@pytest.mark.servers
def test_a_response_without_a_score_stops_the_round_or_is_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd:
        """Gives the responses of one prompt no number."""

        def score(self, samples: Any, resources: Any) -> list[float | None]:
            for one in samples:
                if one.prompt[-1].content == "why":
                    resources.on_problem(one, "it is odd")
            return [None if one.prompt[-1].content == "why" else float(len(one.response)) for one in samples]

    stopping, skipping, split = rewarded(), rewarded(on_error="skip"), reward_set.split_part
    monkeypatch.setattr(
        reward_set, "split_part", lambda spec: (split(spec)[0], Odd() if spec["name"] == "length" else split(spec)[1])
    )
    with pytest.raises(RewardError, match=r"reward 'length' could not score 3 of 24 responses: row \w{12}: it is odd"):
        world.run(stopping)
    directory, metrics = world.run(skipping)
    assert {each.prompt.messages[0].content for each in samples(directory)} == set(TEXTS) - {"why"}
    assert metrics["prompts"] == 7.0
    assert sum("is not scored: length: it is odd" in line for line in world.told.lines) == 3
