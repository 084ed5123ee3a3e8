"""Stages `sft` and `conditional` from rows to a saved model, on a real store."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.config import stage_key
from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.record_files import row_line
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.heads import load_scalar_model
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import response_logps, response_scores
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, Record, Split
from pipeline_lib.stages import conditional, evaluate, sft
from pipeline_lib.stages.conditional import ConditionalConfig
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.stages.evaluate import EvaluateConfig
from pipeline_lib.stages.pretraining import pin_pretraining
from pipeline_lib.stages.sft import SftConfig
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit, context_in
from tests.toy import ORIGIN, chat, dialogue, layout, record, write_reward_model

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
QUICK: dict[str, Any] = {
    "batch_size": 4, "precision": "fp32", "adapter": None, "seed": 3, "max_prompt_tokens": 400,
    "max_response_tokens": 64, "max_truncated_frac": 1.0,
    "optimizer": {"learning_rate": 3e-3, "schedule": "constant", "warmup_frac": 0.0},
}  # fmt: skip


@pytest.fixture
def context(store: ArtifactStore, tmp_path: Path) -> StageContext:
    return context_in(tmp_path / "run", store)


def heard(context: StageContext) -> Told:
    assert isinstance(context.events, Told)
    return context.events


@pytest.fixture
def model(store: ArtifactStore, tmp_path: Path) -> ArtifactRef:
    (tmp_path / "a").mkdir()
    write_tiny_model(tmp_path / "a" / "model", seed=0)
    return commit(store, tmp_path / "a", "model")


def dataset(store: ArtifactStore, directory: Path, split: Split, rows: list[Record]) -> ArtifactRef:
    directory.mkdir()
    (directory / f"{split.value}.jsonl").write_bytes(b"".join(row_line(row) for row in rows))
    return commit(store, directory, "dataset")


PAIRS = [record(dialogue("hi", "yo", f"question {n}?"), f"yes, {n}", "no") for n in range(6)]


@pytest.mark.parametrize(
    ("conditioning", "end"),
    [
        ({"name": "hindsight"}, "assistant\nA helpful answer:\n"),
        ({"name": "hindsight", "layout": "plain", "good_marker": "Good:", "auxiliary": "response"}, "User: hi Good:"),
        ({"name": "classes"}, "GPT4 Assistant:"),
        ({"name": "classes", "sequence_weight": True, "layout": "chat"}, "assistant\nGPT4\n"),
    ],
)
def test_a_conditional_model_is_saved_with_its_condition(
    conditioning: dict[str, Any], end: str, context: StageContext, model: ArtifactRef, tmp_path: Path
) -> None:
    rows = dataset(context.store, tmp_path / "b", Split.POLICY, [*PAIRS, record("nothing compared", "here")])
    values = {**QUICK, "batch_size": 8, "max_steps": 8, "epochs": 9, "conditioning": conditioning}
    config = validate(ConditionalConfig, values, where="test")
    output = conditional.run(config, {"sft_model": model, "dataset": rows}, context)
    assert output.kind == "model"
    losses = heard(context).series("conditional/loss")
    assert losses[-1] < losses[0]
    saved = ChatTokenizer.load(output.directory / "model")
    assert saved.render(dialogue("hi"), add_generation_prompt=True).endswith(end)
    facts = json.loads((output.directory / "training.json").read_bytes())
    assert facts["template_sha256"] == saved.template_sha256
    kinds = {"hindsight": 4 * (13 if "auxiliary" in conditioning else 1), "classes": 2}
    assert facts["rows"] == 6 * kinds[conditioning["name"]]
    # The vocabulary is the one it had, and the weights are not.
    before = tmp_path / "run" / "input-sft_model" / "model"
    assert ChatTokenizer.load(before).ids("aé {") == saved.ids("aé {")
    one, other = (load_causal_model(folder, dtype=torch.float32) for folder in (before, output.directory / "model"))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_rows_that_say_nothing_are_no_rows(context: StageContext, model: ArtifactRef, tmp_path: Path) -> None:
    rows = dataset(context.store, tmp_path / "b", Split.POLICY, [record("q", "a"), record("q", "a", "b", ranks=(1, 1))])
    with pytest.raises(DataError, match="no answers of which it is known how good they are"):
        conditional.run(ConditionalConfig(**QUICK), {"sft_model": model, "dataset": rows}, context)


def test_unknown_keys_of_a_conditioning_are_named() -> None:
    with pytest.raises(ConfigError, match="good_marker"):
        validate(ConditionalConfig, {"conditioning": {"name": "hindsight", "good_maker": "x"}}, where="x.yaml")
    with pytest.raises(ConfigError, match="hindsight"):
        validate(ConditionalConfig, {"conditioning": {"name": "hindsigth"}}, where="x.yaml")


def test_sft_with_everything(context: StageContext, model: ArtifactRef, tmp_path: Path) -> None:
    lines = [{"text": f"Some plain text, number {n}. " * 9} for n in range(5)]
    lines += [{"text": ""}, {"body": "x"}, {"text": "a <|im_end|> b"}]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    rows = dataset(context.store, tmp_path / "b", Split.SFT, [record(f"question {n}", "an answer") for n in range(8)])
    values = {
        **QUICK, "epochs": 4, "kl_coef": 0.05, "loss": {"reduction": "sample_mean", "label_smoothing": 0.05},
        "pretraining": {"path": str(texts), "coef": 0.1, "rows_per_step": 2, "max_tokens": 100},
    }  # fmt: skip
    config = pin_pretraining(validate(SftConfig, values, where="test"), LocalPlaces())
    output = sft.run(config, {"base_model": model, "dataset": rows}, context)
    series = [json.loads(line) for line in (output.directory / "metrics.jsonl").read_text().splitlines()]
    assert len(series) == 8
    assert series[0]["kl_per_token_nats"] == pytest.approx(0.0, abs=1e-6)
    for name in ("loss", "nll_per_token_nats", "pretraining_nll_per_token_nats"):
        assert series[-1][name] < 0.8 * series[0][name]
    told = [line for line in heard(context).lines if "refused" in line]
    refused = {"E_CONTROL_TOKENS": 1, "E_JSON": 1, "E_MISSING_FIELD": 2}
    assert told == [f"pretraining text: {code} refused {count} rows" for code, count in refused.items()]


def test_pretraining_text_is_in_the_stage_key_by_its_content(
    context: StageContext, model: ArtifactRef, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    config = validate(SftConfig, {**QUICK, "pretraining": {"path": str(texts)}}, where="test")
    keys = []
    for text in ("one", "two", "one"):
        texts.write_text(json.dumps({"text": text}) + "\n")
        pinned = pin_pretraining(config, LocalPlaces())
        keys.append(stage_key("sft", sft.VERSION, pinned, {}))
    assert keys[0] == keys[2] != keys[1]
    assert pin_pretraining(SftConfig(), LocalPlaces()) == SftConfig()
    texts.write_text(json.dumps({"text": "three"}) + "\n")
    rows = dataset(context.store, tmp_path / "b", Split.SFT, [record("q", "a")])
    with pytest.raises(DataError, match="is not what it was when the run was planned"):
        sft.run(pinned, {"base_model": model, "dataset": rows}, context)


@pytest.mark.skipif(not (SHARED / "hh_rlhf").is_dir(), reason="the shared data is not there")
@pytest.mark.parametrize("name", ["hindsight", "classes"])
def test_real_comparisons_are_learnt_from(name: str, context: StageContext, model: ArtifactRef, tmp_path: Path) -> None:
    source = Jsonl(path=str(SHARED / "hh_rlhf" / "harmless-base.jsonl.gz"), max_rows=40)
    found = [row for row in source.rows(LocalPlaces(), lambda _: None) if isinstance(row, Record)]
    assert len(found) > 30
    rows = dataset(context.store, tmp_path / "b", Split.POLICY, found)
    config = validate(ConditionalConfig, {**QUICK, "max_steps": 12, "conditioning": {"name": name}}, where="test")
    conditional.run(config, {"sft_model": model, "dataset": rows}, replace(context))
    losses = heard(context).series("conditional/loss")
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_answers_are_scored_without_the_words_they_were_given_behind(
    context: StageContext, model: ArtifactRef, tmp_path: Path
) -> None:
    """Reward model and reference read prompt and answer as their own template has them."""
    rows = dataset(context.store, tmp_path / "b", Split.POLICY, PAIRS)
    config = validate(ConditionalConfig, {**QUICK, "max_steps": 2}, where="test")
    trained = conditional.run(config, {"sft_model": model, "dataset": rows}, context)
    base = tmp_path / "a" / "model"
    judge = tmp_path / "judge"
    write_reward_model(base, judge / "model")
    ChatTokenizer.load(base).tokenizer.save_pretrained(judge / "model")
    (judge / "normalization.json").write_text(json.dumps({"gain": 2.0, "bias": 0.5}))
    shutil.copytree(trained.directory / "model", tmp_path / "c" / "model")
    inputs = {
        "model": commit(context.store, tmp_path / "c", "model"), "reference_model": model,
        "reward_model": commit(context.store, judge, "reward_model"),
        "dataset": dataset(context.store, tmp_path / "d", Split.GATE, [record("hi", "yo"), record("and", "so")]),
    }  # fmt: skip
    (tmp_path / "run" / "second").mkdir()
    settings = EvaluateConfig(max_new_tokens=8, precision="fp32")
    output = evaluate.run(settings, inputs, replace(context, workdir=tmp_path / "run" / "second"))
    examples = [json.loads(line) for line in (output.directory / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 2
    reader = Encoder(ChatTokenizer.load(tmp_path / "c" / "model"), 100, 100)
    plain = Encoder(ChatTokenizer.load(base), 100, 100)
    policy, reference = (load_causal_model(at, dtype=torch.float32) for at in (tmp_path / "c" / "model", base))
    scorer = load_scalar_model(judge / "model", dtype=torch.float32).eval()
    for example in examples:
        asked = Record.create(dialogue(example["prompt"][0]["content"]), origin=ORIGIN)
        prompt = reader.tree(asked).prompt_ids
        assert chat().tokenizer.decode(prompt).endswith("A helpful answer:\n")
        (drawn,) = sample(
            policy, [prompt], SamplingSettings(max_new_tokens=8, temperature=0), eos_id=2, pad_id=0, seed=0
        )
        tree = replace(plain.tree(asked), response_ids=(drawn.ids,))
        (score,) = response_scores(scorer, [tree], layout())[tree.record_id]
        (logp,) = response_logps(reference, [tree], layout())[tree.record_id]
        assert example["score"] == pytest.approx(2 * score + 0.5, abs=1e-4)
        assert example["reference_model_logp"] == pytest.approx(logp, abs=1e-3)
