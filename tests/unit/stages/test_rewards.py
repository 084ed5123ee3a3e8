"""What a stage does before its reward sources score: inputs by name, files pinned and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.errors import ConfigError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.ppo import PpoConfig
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.stages.rewards import pin_rewards, reward_inputs
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.validation import validate


def ppo(*parts: dict[str, Any]) -> PpoConfig:
    return validate(PpoConfig, {"rewards": {"parts": parts}}, where="ppo")


def made(digit: str) -> ArtifactRef:
    return ArtifactRef(kind="reward_model", id=digit * 64)


def test_further_reward_models_become_inputs_and_the_main_one_is_there_already() -> None:
    models = {"safe": made("a"), "other": made("b")}
    chosen = ppo({"name": "llama2", "safe": "safe"}, {"name": "length", "target": 3})
    assert reward_inputs(chosen.rewards, models) == {"reward_model:safe": models["safe"]}
    assert reward_inputs(None, models) == {}
    assert reward_inputs(ppo({"name": "reward_model"}).rewards, models) == {}
    with pytest.raises(ConfigError, match="ask a reward model 'safe', which the run does not have") as caught:
        reward_inputs(chosen.rewards, {"other": models["other"]})
    assert caught.value.next_step == "add reward_models.safe, or name one of reward, other"


def test_the_content_of_files_is_in_the_stage_key(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("{}\n")
    chosen = ppo({"name": "judge", "recorded": str(path)})
    first = pin_rewards(chosen)
    assert first.rewards is not None
    assert list(first.rewards.fingerprints) == [str(path)]
    assert pin_rewards(first) == first
    path.write_text("\n")
    assert pin_rewards(chosen) != first
    path.unlink()
    with pytest.raises(ConfigError, match="no recorded answers"):
        pin_rewards(chosen)


def test_stages_without_sources_stay_as_they_are() -> None:
    assert pin_rewards(PpoConfig()) == PpoConfig()
    assert pin_rewards(PreferenceConfig()) == PreferenceConfig()


def test_a_run_takes_sources_from_its_file() -> None:
    values = {"ppo": {"rewards": {"parts": [{"name": "reward_model"}, {"name": "ends_with", "weight": 0.1}]}}}
    config = validate(RunConfig, values, where="a file")
    assert config.ppo is not None
    assert config.ppo.rewards is not None
    assert config.ppo.rewards.parts[1]["endings"] == [".", "!", "?"]
    with pytest.raises(ConfigError, match="did you mean 'ends_with'"):
        validate(RunConfig, {"ppo": {"rewards": {"parts": [{"name": "end_with"}]}}}, where="a file")
