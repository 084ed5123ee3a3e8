"""The reward stage on a tiny model and a real store: rows by tag, report card, normalisation, real rankings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate_metrics import GATE_METRICS
from pipeline_lib.evaluation.report_card import ReportCard
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.models.heads import load_scalar_model
from pipeline_lib.models.scoring import Layout, response_scores
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, Message, Origin, Record, Response
from pipeline_lib.stages.contract import StageOutput
from pipeline_lib.stages.reward import RewardConfig, normalization_of, run
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit, context_in

pytestmark = pytest.mark.servers

SHARED_DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def pair(n: int, *tags: str, strength: Any = None) -> Record:
    """The better answer ends with an exclamation mark."""
    return Record.create(
        (Message(role="user", content=f"{tags} {n}"),),
        (Response(content=f"answer {n}!"), Response(content=f"answer {n}.")), (1, 2),
        origin=Origin(source="s"), tags=tags, strength=strength,
    )  # fmt: skip


class Bench:
    """Artifacts that the stage takes, and the stage run on them."""

    def __init__(self, store: ArtifactStore, tmp_path: Path) -> None:
        self.store, self.tmp_path, self.told = store, tmp_path, Told()
        write_tiny_model(tmp_path / "model" / "model", seed=0)
        self.model = commit(store, tmp_path / "model", "model")

    def dataset(self, **splits: list[Record]) -> ArtifactRef:
        directory = self.tmp_path / f"dataset-{len(list(self.tmp_path.iterdir()))}"
        directory.mkdir()
        for split in ("sft", "reward", "reward_test", "policy"):
            lines = [record.model_dump_json() + "\n" for record in splits.get(split, [])]
            (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        return commit(self.store, directory, "dataset")

    def run(self, dataset: ArtifactRef, **config: Any) -> StageOutput:
        chosen = {
            "precision": "fp32", "batch_size": 8, "max_prompt_tokens": 64, "max_response_tokens": 48,
            "max_truncated_frac": 1.0,
            "adapter": {"name": "lora", "rank": 4}, "optimizer": {"learning_rate": 5e-3}, **config,
        }  # fmt: skip
        home = self.tmp_path / f"run-{len(list(self.tmp_path.iterdir()))}"
        context = context_in(home, self.store, told=self.told, key=f"key-{home.name}")
        return run(RewardConfig.model_validate(chosen), {"sft_model": self.model, "dataset": dataset}, context)


@pytest.fixture
def bench(store: ArtifactStore, tmp_path: Path) -> Bench:
    return Bench(store, tmp_path)


def read(output: StageOutput, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output.directory / name).read_bytes())
    return content


def test_the_report_card_and_what_the_gate_reads(bench: Bench) -> None:
    strengths = ("significantly", "slightly")
    dataset = bench.dataset(
        reward=[pair(n) for n in range(16)], reward_test=[pair(n, strength=strengths[n % 2]) for n in range(50, 62)]
    )
    output = bench.run(dataset, epochs=5, optimizer={"learning_rate": 1e-2})
    card = read(output, "report_card.json")
    assert output.kind == "reward_model"
    assert output.metrics["test_accuracy_frac"] == card["test_accuracy_frac"] == 1.0
    assert {name: card[name] for name in ("test_pairs", "test_rows")} == {"test_pairs": 12.0, "test_rows": 12.0}
    measured = GATE_METRICS.build({"name": "reward_model_accuracy"}).measure(
        Evidence(models={}, reward_model=output.metrics), "", bootstrap=Bootstrap()
    )
    assert measured.value == 1.0
    tables = ReportCard.model_validate(
        {"figures": {}, **{name: card[name] for name in ReportCard.model_fields if name != "figures"}}
    )
    assert [(bucket.name, bucket.num_pairs) for bucket in tables.by_strength] == [("significantly", 6), ("slightly", 6)]
    assert sum(place.num_pairs for place in tables.reliability) == 12
    assert max(card["scores_moved"].values()) <= 1e-4
    assert card["scores_moved"].keys() == {"padded", "packed"}
    scale = read(output, "normalization.json")
    assert (scale["gain"], scale["bias"]) == (card["normalization_gain"], card["normalization_bias"])
    assert scale["gain"] == pytest.approx(1 / tables.scores.std, rel=1e-9)
    assert scale["gain"] * tables.scores.mean + scale["bias"] == pytest.approx(0.0, abs=1e-9)
    assert (output.directory / "model" / "model.safetensors").is_file()


def test_two_models_learn_from_their_own_rows(bench: Bench) -> None:
    """The safety model sees a tenth of helpful rows, and is tested on safety alone."""
    dataset = bench.dataset(
        reward=[*(pair(n, "safe") for n in range(18)), *(pair(n, "helpful") for n in range(12))],
        reward_test=[*(pair(n, "safe") for n in range(50, 53)), *(pair(n, "helpful") for n in range(50, 57))],
    )
    safety = {"tags": ["safe"], "mix_tags": ["helpful"], "mix_frac": 0.1}
    found = {
        name: bench.run(dataset, max_steps=1, rows=rows)
        for name, rows in (("safe", safety), ("helpful", {"tags": ["helpful"]}), ("both", {}))
    }
    facts = {name: read(output, "training.json") for name, output in found.items()}
    assert {name: given["rows"] for name, given in facts.items()} == {"safe": 20, "helpful": 12, "both": 30}
    assert facts["safe"]["mixed_in_frac"] == pytest.approx(0.1)
    assert {name: output.metrics["test_rows"] for name, output in found.items()} == {
        "safe": 3.0, "helpful": 7.0, "both": 10.0,
    }  # fmt: skip


def test_tags_that_no_row_has_are_an_error_of_the_data(bench: Bench) -> None:
    dataset = bench.dataset(reward=[pair(0, "safe")], reward_test=[pair(1, "safe")])
    with pytest.raises(DataError, match=r"the split 'reward' holds no comparisons tagged helpful"):
        bench.run(dataset, rows={"tags": ["helpful"]})


def test_scores_of_reference_samples_are_normalised(bench: Bench) -> None:
    """Other texts than the held-out responses, so another gain; the prompts are the policy's, each once."""
    prompts = [
        Record.create((Message(role="user", content=f"p {n % 6}"),), origin=Origin(source="s")) for n in range(9)
    ]
    dataset = bench.dataset(
        reward=[pair(n) for n in range(8)], reward_test=[pair(n) for n in range(50, 54)], policy=prompts
    )
    how = {"max_steps": 1, "normalize_on": "reference_samples", "normalize_tokens": 6}
    sampled = bench.run(dataset, **how, optimizer={"learning_rate": 1e-5})
    assert "sampled 6/6 responses of the SFT model" in bench.told.texts
    held_out = bench.run(dataset, max_steps=1)
    gains = [read(output, "normalization.json")["gain"] for output in (sampled, held_out)]
    assert all(math.isfinite(gain) and gain > 0 for gain in gains)
    assert gains[0] != gains[1]
    # The head was scaled to standard deviation 1 on these samples before training: one tiny step moved it a little.
    assert gains[0] == pytest.approx(1.0, rel=0.01)
    again = bench.run(dataset, **how, optimizer={"learning_rate": 1e-5})
    assert read(again, "report_card.json") == read(sampled, "report_card.json")


def demonstration(n: int) -> Record:
    return Record.create(
        (Message(role="user", content=f"show {n}"),), (Response(content=f"so {n}"),), origin=Origin(source="s")
    )


def test_demonstrations_have_a_mean_score_of_0(bench: Bench) -> None:
    """As in InstructGPT: moved, not scaled; neither comparisons of the split nor further rows count."""
    shown = [demonstration(n) for n in range(6)]
    parts = {"reward": [pair(n) for n in range(8)], "reward_test": [pair(n) for n in range(50, 54)]}
    dataset = bench.dataset(sft=[pair(90), *shown], **parts)
    output = bench.run(dataset, max_steps=1, normalize_on="demonstrations", normalize_samples=4)
    scale = read(output, "normalization.json")
    encoder = Encoder(ChatTokenizer.load(output.directory / "model"), 64, 48)
    model = load_scalar_model(output.directory / "model", dtype=torch.float32).eval()
    trees = [encoder.tree(row) for row in shown[:4]]
    raw = [score for row in response_scores(model, trees, Layout(True, 0, 1024)).values() for score in row]
    assert scale["gain"] == 1.0
    assert sum(raw) / 4 + scale["bias"] == pytest.approx(0.0, abs=1e-4)
    with pytest.raises(DataError, match="the split 'sft' holds no demonstrations"):
        bench.run(bench.dataset(**parts), normalize_on="demonstrations")


def test_a_safety_model_learns_from_tags_what_is_safe(bench: Bench) -> None:
    rows = [pair(n, "harmless", "best-safe") for n in range(8)]
    dataset = bench.dataset(reward=rows, reward_test=[pair(n) for n in range(50, 54)])
    bench.run(dataset, max_steps=2, safety={"coef": 0.5})
    assert all(0 <= figures["reward/safety_accuracy_frac"] <= 1 for _, figures in bench.told.figures)
    with pytest.raises(DataError, match="none of the comparisons has a tag that says so: yes, all-safe, none-safe"):
        bench.run(dataset, safety={"best_safe_tags": ["yes"]})


def test_normalisation_by_hand() -> None:
    """Mean 3 and biased standard deviation 2."""
    assert normalization_of([1.0, 5.0, 1.0, 5.0]) == {"gain": 0.5, "bias": -1.5}
    assert normalization_of([2.0, 2.0]) == {"gain": 1.0, "bias": -2.0}


@pytest.mark.parametrize("name", ["finegrained_rlhf/qa_feedback_k4", "squality_ranking/human_rankings_k3"])
def test_real_rankings_bring_the_loss_down(name: str, bench: Bench) -> None:
    path = SHARED_DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the shared data sets are not here")
    rows = [row for row in Jsonl(path=str(path)).rows(LocalPlaces(), lambda _: None) if isinstance(row, Record)]
    dataset = bench.dataset(reward=rows[:8], reward_test=rows[8:12])
    output = bench.run(dataset, epochs=4, optimizer={"learning_rate": 3e-3})
    losses = bench.told.series("reward/loss")
    assert losses[-1] < losses[0]
    ranking = ReportCard.model_validate({
        "figures": {}, **{k: v for k, v in read(output, "report_card.json").items() if k in ReportCard.model_fields}
    })  # fmt: skip
    assert [bucket.name for bucket in ranking.by_rank_gap][:2] == ["1", "2"]


def test_the_loss_is_a_plug_in_and_the_old_key_names_it() -> None:
    assert RewardConfig().loss["name"] == "bradley_terry"
    assert RewardConfig().loss["centring"] == 0.01
    with pytest.raises(ConfigError, match="unknown reward loss 'bradley_tery'; did you mean 'bradley_terry'"):
        RewardConfig.model_validate({"loss": {"name": "bradley_tery"}})
    with pytest.raises(ValidationError):
        RewardConfig.model_validate({"centring": 0.1})
    with pytest.raises(ConfigError, match="'loss'"):
        validate(RewardConfig, {"centring": 0.1}, where="reward")
