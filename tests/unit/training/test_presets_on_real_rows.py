"""Every method's preset, trained for a few steps on rows that people wrote and judged: the loss goes down."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from pipeline_lib.config import PRESETS, load
from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.errors import ConfigError
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.schema import Record
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.stages.run_config import RunConfig
from tests.toy import World, preference_recipe, settings

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"
PAIRS_FILE, LISTS_FILES = (
    "hh_rlhf/helpful-base",
    ("finegrained_rlhf/qa_feedback_k4", "squality_ranking/human_rankings_k3"),
)
METHODS = sorted(path.stem for path in (PRESETS / "methods").glob("*.yaml"))


def real_rows(name: str, count: int) -> list[Record]:
    """The first short rows of a real file, by its own layout."""
    path = SHARED_DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the shared data sets are not here")
    rows = (
        row
        for row in Jsonl(path=str(path)).rows(LocalPlaces(), lambda _: None)
        if isinstance(row, Record) and len(set(row.ranks)) > 1
    )
    return list(islice(rows, count))


def candidate_of(config: RunConfig) -> PreferenceConfig | None:
    """The preset's own candidate, where it is one of the preference stage."""
    candidate = config.candidates.get(config.name)
    return candidate if isinstance(candidate, PreferenceConfig) else None


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_loads_and_has_a_candidate(method: str) -> None:
    config = load(PRESETS / "methods" / f"{method}.yaml", RunConfig).value
    assert config.name == method
    assert config.all_candidates()
    assert config.promote.model_name == f"prefline-{method}"


def test_what_the_registry_cannot_serve_is_refused_before_anything_runs() -> None:
    for place in ("sft", "candidates.prefix-tuning"):
        with pytest.raises(ConfigError, match=r"prefix-tuned model is no plain model.*promote\.enabled: false"):
            load(PRESETS / "methods" / "prefix-tuning.yaml", RunConfig, ["promote.enabled=true", f"{place}.seed=1"])


def test_every_loss_has_a_preset() -> None:
    configs = [load(PRESETS / "methods" / f"{method}.yaml", RunConfig).value for method in METHODS]
    used = {candidate.loss["name"] for config in configs if (candidate := candidate_of(config)) is not None}
    assert used == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_goes_down_on_real_rows(method: str, directory: Path, world: World) -> None:
    config = candidate_of(load(PRESETS / "methods" / f"{method}.yaml", RunConfig).value)
    if config is None:
        pytest.skip("not a preference loss")
    if config.adapter is not None and config.adapter.name == "qlora":
        pytest.skip("needs CUDA")
    # RMSprop's first steps are ten times the rate; few or scaled weights need large ones.
    few = config.adapter is not None and config.adapter.name in ("ia3", "prefix", "prompt")
    rate = 5e-4 if config.optimizer.name == "rmsprop" else 5e-2 if few else 5e-3
    files = LISTS_FILES if config.objective.form == "list" else (PAIRS_FILE,)
    rows = [row for file in files for row in real_rows(file, 4 // len(files))]
    chosen = settings(
        batch_size=len(rows), epochs=4, adapter=config.adapter, max_prompt_tokens=48, max_response_tokens=32,
        optimizer={"name": config.optimizer.name, "learning_rate": rate},
    )  # fmt: skip
    recipe = preference_recipe(directory, chosen, config.loss, rows, max_prompt_tokens=48, max_response_tokens=32)
    series = world.loop(recipe, chosen).run()
    assert series[-1]["loss"] < series[0]["loss"]
    if recipe.reference is not None:
        assert series[0]["log_ratio_abs_nats_per_token"] <= 1e-4
