"""PPO beside TRL: the rule, what both sides are given, and what the page says of their figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ppo_memory
from benchmarks.page import marker
from benchmarks.ppo_peer_jobs import PRESETS, PpoMeasured, PpoResult
from benchmarks.ppo_peer_ours import Rule, keep_reward_model, ppo_recipe, prepared, run, settings_of
from benchmarks.ppo_peer_rule import score, share_of, variety_of, words_of
from benchmarks.ppo_peer_table import render, write_section
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.training.rollout import rollout_tree
from tests.toy import byte_ids

BEGIN, END = marker("ppo-peer", "begin"), marker("ppo-peer", "end")

ROOT = Path(__file__).resolve().parents[3]
SMALL = PRESETS["toy-lora"].model_copy(update={"batch_size": 4, "new_tokens": 6, "wanted": ("the", "silver")})


def test_the_rule_by_hand() -> None:
    text = "The river, the  stone. (silver)"
    assert words_of(text) == ["the", "river", "the", "stone", "silver"]
    assert share_of(text, ("the", "silver")) == 3 / 5
    assert variety_of(text, ("the", "gold")) == 1 / 2
    assert score(text, ("the", "silver")) == (3 / 5 + 1) / 2
    assert score("silver the", ("the", "silver")) == 1.0
    assert score(" ,.", ("the",)) == 0.0


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_each_iteration_samples_after_the_prompts_that_the_other_side_gets(trainable: str, tmp_path: Path) -> None:
    preset = SMALL.model_copy(update={"trainable": trainable})
    write_tiny_model(tmp_path / "model", seed=0)
    keep_reward_model(preset, tmp_path / "model", tmp_path)
    prompts = [[byte_ids(f"{n} and {place}") for place in range(4)] for n in range(preset.iterations)]
    found = prepared(tmp_path / "model", prompts)
    settings = settings_of(preset)
    recipe = ppo_recipe(found, settings, tmp_path, scorer=None)  # the rule finds no word in what a random model says
    for number, batch in enumerate(prompts):
        assert [list(tree.prompt_ids) for tree in recipe.plan.full_batch(number)] == batch
    assert recipe.critic.is_on_policy is (trainable == "lora")
    told = run(recipe, settings)
    assert len(told.ends_s) == recipe.num_steps == preset.iterations * preset.minibatches * preset.ppo_epochs
    assert told.peak_bytes > 0
    assert {row["response_tokens"] for row in told.series} == {6.0}, "the end of a turn ends no response"


def test_what_follows_the_end_of_a_turn_is_not_scored(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, seed=0)
    chat = ChatTokenizer.load(tmp_path)
    tree = rollout_tree(0, byte_ids("x"), [*byte_ids("the"), chat.eos_id])
    assert Rule(chat, ("the",)).score([tree], [tree], [True]).score_R.tolist() == [1.0]


def measured(side: str, **changed: Any) -> PpoMeasured:
    values: dict[str, Any] = {
        "side": side, "iteration_ends_s": [100.0, 110.0, 120.0, 130.0, 140.0], "scores": [0.1, 0.2, 0.3, 0.4, 0.5],
        "kl_nats": [0.0, 1.0, 2.0, 3.0, 4.0], "peak_bytes": 2**30, "trainable_parameters": 7,
        "versions": {"torch": "2"}, "note": "a note",
    }  # fmt: skip
    return PpoMeasured.model_validate(values | changed)


def test_a_line_of_the_table(tmp_path: Path) -> None:
    # 4 timed iterations of 16 responses: 64 in 40 s, and in 160 s.
    peer = measured(
        "peer", iteration_ends_s=[0.0, 40.0, 80.0, 120.0, 160.0], peak_bytes=4 * 2**30, scores=[0.1] * 5,
        kl_nats=[0.0] * 5,
    )  # fmt: skip
    result = PpoResult(
        name="smollm2", preset=PRESETS["smollm2"], processor="a processor", threads=2,
        runs={"ours": [measured("ours")], "peer": [peer]},
    )  # fmt: skip
    line = render([result]).splitlines()[2]
    assert line == (
        "| `smollm2` | 1.60 / 0.40 | 4.00 × (≥ 2) | 1.00 / 4.00 GiB | 0.25 (≤ 0.5) | 0.100 | "
        "0.500 / 0.100 | 4.0 / 0.0 |"
    )
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "smollm2.json").write_text(result.model_dump_json())
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert write_section(tmp_path / "results", page) == render([result])
    assert page.read_text() == f"before\n{BEGIN}\n{render([result])}\n{END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the markers"):
        write_section(tmp_path / "results", page)


def test_the_last_fifth_of_the_iterations_is_what_was_reached() -> None:
    assert measured("ours").last_score == 0.5
    assert measured("ours", scores=[0.0] * 8 + [0.4, 0.6]).last_score == 0.5


def test_the_memory_line() -> None:
    sizes = {"sft": 2, "shared": 3, "apart": 4}
    result = {
        "threads": 2, "goal": 1.6, "ratio": 1.5,
        **{
            kind: {"peak_bytes": size * 2**30, "before_bytes": 2**29, "tokens_per_batch": 1024}
            for kind, size in sizes.items()
        },
    }  # fmt: skip
    assert ppo_memory.line(result) == (
        "SmolLM2-135M in fp32, LoRA, forwards of at most 1024 tokens, 2 threads: SFT peaks at 2.00 GiB, PPO at 3.00 "
        "GiB, **1.50 ×** as much (goal: ≤ 1.6); with a second base for reward model and value function 4.00 GiB, "
        "2.00 ×. Before a model is loaded a process holds 0.50 GiB."
    )


@pytest.mark.parametrize("module", ["benchmarks.ppo_peer", "benchmarks.ppo_memory"])
def test_the_driver_holds_no_torch(module: str) -> None:
    code = f"import {module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
