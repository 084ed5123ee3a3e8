"""Every method's preset, trained for a few steps on rows that people wrote and judged: the loss goes down."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.config import PRESETS, load
from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.errors import ConfigError
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.schema import Record
from pipeline_lib.stages.conditional import ConditionalConfig, conditioned_encoder
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.stages.reward import RewardConfig
from pipeline_lib.stages.rounds_config import IteratedDpoConfig, RejectionSettings
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.stages.sft import SftConfig
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.recipes.reward import Label, RewardRecipe
from pipeline_lib.training.recipes.sft import KlPenalty, SftRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.settings import OfflineSettings
from tests.toy import World, encoder, layout, policy_of, preference_recipe, reward_model_of, settings

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"
PAIRS_FILE, LISTS_FILES, ANSWERS_FILE = (
    "hh_rlhf/helpful-base",
    ("finegrained_rlhf/qa_feedback_k4", "squality_ranking/human_rankings_k3"),
    "alpaca/alpaca_sample",
)
METHODS = sorted(path.stem for path in (PRESETS / "methods").glob("*.yaml"))
ONLINE = {"ppo-guarded", "ppo-instructgpt", "ppo-llama2", "ppo-n-details", "rloo", "grpo"}
"""They train on nothing but what they sample."""
LIMITS: dict[str, Any] = {"max_prompt_tokens": 48, "max_response_tokens": 32}
Offline = PreferenceConfig | ConditionalConfig | SftConfig | RewardConfig


def real_rows(name: str, count: int) -> list[Record]:
    """The first rows of a real file, by its own layout, that say what a method can learn from."""
    path = SHARED_DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the shared data sets are not here")
    rows = (
        row
        for row in Jsonl(path=str(path)).rows(LocalPlaces(), lambda _: None)
        if isinstance(row, Record) and (row.kind == "demonstration" or len(set(row.ranks)) > 1)
    )
    return list(islice(rows, count))


def load_preset(method: str) -> RunConfig:
    return load(PRESETS / "methods" / f"{method}.yaml", RunConfig).value


def subject_of(config: RunConfig) -> Offline | None:
    """What a preset is about: its own candidate or what that trains with, its reward model or its SFT."""
    candidate = config.candidates.get(config.name)
    if isinstance(candidate, PreferenceConfig | ConditionalConfig):
        return candidate
    if isinstance(candidate, RejectionSettings):
        return candidate.sft()
    if isinstance(candidate, IteratedDpoConfig):
        return candidate.preference()
    if config.name in ONLINE:
        return None
    return config.reward if config.name.startswith("reward-") else config.sft


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_loads_and_has_a_candidate(method: str) -> None:
    config = load_preset(method)
    assert config.name == method
    assert config.all_candidates()
    assert config.promote.model_name == f"prefline-{method}"


def test_what_the_registry_cannot_serve_is_refused_before_anything_runs() -> None:
    for place in ("sft", "candidates.prefix-tuning"):
        with pytest.raises(ConfigError, match=r"prefix-tuned model is no plain model.*promote\.enabled: false"):
            load(PRESETS / "methods" / "prefix-tuning.yaml", RunConfig, ["promote.enabled=true", f"{place}.seed=1"])


def test_every_loss_has_a_preset() -> None:
    subjects = [subject_of(load_preset(method)) for method in METHODS]
    assert {each.loss["name"] for each in subjects if isinstance(each, PreferenceConfig)} == set(PREFERENCE_LOSSES)
    assert {each.loss["name"] for each in subjects if isinstance(each, RewardConfig)} == set(REWARD_LOSSES)
    assert [method for method, each in zip(METHODS, subjects, strict=True) if each is None] == sorted(ONLINE)


def test_every_kind_of_a_loss_has_a_preset() -> None:
    subjects = [subject_of(load_preset(method)) for method in METHODS]
    losses = [each.loss for each in subjects if isinstance(each, PreferenceConfig | RewardConfig)]
    assert {loss["kind"] for loss in losses if loss["name"] == "slic"} == {"rank", "margin", "list", "reward"}
    assert {loss["reg"] for loss in losses if loss["name"] == "slic"} >= {"ce", "kl"}
    assert {loss.get("margins") for loss in losses if loss["name"] == "bradley_terry"} >= {"small", "large"}


def test_published_ppo_leaves_the_scores_of_cut_answers_as_they_are() -> None:
    """InstructGPT and LLaMA-2 have no rule for them; lm-human-preferences replaces theirs."""
    llama2 = load_preset("ppo-llama2")
    rejection = llama2.candidates["rejection"]
    assert isinstance(rejection, RejectionSettings)
    assert rejection.sampling.missing_eos == "keep"
    for method, rule in (("ppo-llama2", "keep"), ("ppo-instructgpt", "keep"), ("ppo-n-details", "replace")):
        ppo = load_preset(method).ppo
        assert ppo is not None
        assert ppo.missing_eos == rule


def test_a_guarded_ppo_is_measured_by_a_model_of_other_rows() -> None:
    config = load_preset("ppo-guarded")
    assert config.ppo is not None
    assert config.ppo.heldout_reward_model == "heldout"
    assert config.reward.rows.part == (1, 2)
    assert config.reward_models["heldout"].rows.part == (2, 2)


def rows_for(config: Offline) -> list[Record]:
    """Four real rows of the form that a method takes."""
    if isinstance(config, SftConfig):
        return real_rows(ANSWERS_FILE, 4)
    is_of_lists = (
        REWARD_LOSSES.build(config.loss).__class__.__name__ != "BradleyTerry"
        if isinstance(config, RewardConfig)
        else isinstance(config, PreferenceConfig) and config.objective.form == "list"
    )
    files: Sequence[str] = LISTS_FILES if is_of_lists else (PAIRS_FILE,)
    return [row for file in files for row in real_rows(file, 4 // len(files))]


def recipe_of(config: Offline, directory: Path, chosen: OfflineSettings, rows: Sequence[Record]) -> Recipe:
    """The preset's own objective on the rows, from a tiny model."""
    encode = encoder(**LIMITS)
    if isinstance(config, PreferenceConfig):
        return preference_recipe(directory, chosen, config.loss, rows, **LIMITS)
    if isinstance(config, RewardConfig):
        return RewardRecipe(
            reward_model_of(directory, chosen), DataPlan.of([encode.tree(row) for row in rows], chosen), layout(),
            objective=REWARD_LOSSES.build(config.loss), labels={row.id: Label.of(row, config.safety) for row in rows},
            safety=config.safety,
        )  # fmt: skip
    policy = policy_of(directory, chosen)
    if isinstance(config, ConditionalConfig):
        trees = [tree for row in rows for tree in conditioned_encoder(config, encode).trees(row)]
        return SftRecipe(policy, DataPlan.of(trees, chosen), layout(), objective=config.loss)
    return SftRecipe(
        policy, DataPlan.of([encode.tree(row) for row in rows], chosen), layout(), objective=config.loss,
        kl=KlPenalty(config.kl_coef, Reference.of(policy)) if config.kl_coef else None,
        residual_dropout=config.residual_dropout,
    )  # fmt: skip


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ONLINE])
def test_the_loss_goes_down_on_real_rows(method: str, directory: Path, world: World) -> None:
    config = subject_of(load_preset(method))
    assert config is not None
    if config.adapter is not None and config.adapter.name == "qlora":
        pytest.skip("needs CUDA")
    # RMSprop's first steps are ten times the rate; few or scaled weights need large ones, a new head small ones.
    few = config.adapter is not None and config.adapter.name in ("ia3", "prefix", "prompt")
    is_gentle = config.optimizer.name == "rmsprop" or isinstance(config, RewardConfig)
    rate = 5e-4 if is_gentle else 5e-2 if few else 5e-3
    rows = rows_for(config)
    chosen = settings(
        batch_size=4 * len(rows), epochs=4, adapter=config.adapter, neftune_alpha=config.neftune_alpha,
        optimizer={"name": config.optimizer.name, "learning_rate": rate}, **LIMITS,
    )  # fmt: skip
    recipe = recipe_of(config, directory, chosen, rows)
    series = world.loop(recipe, chosen).run()
    assert len(series) == 4
    assert series[-1]["loss"] < series[0]["loss"]
    if "log_ratio_abs_nats_per_token" in series[0]:
        assert series[0]["log_ratio_abs_nats_per_token"] <= 1e-4
