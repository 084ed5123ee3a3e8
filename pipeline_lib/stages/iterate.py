"""Rounds of the whole loop: what each starts from, what it changes, and the record that it leaves.

A round that is finished is an artifact under a key of its configuration and of what it started
from, so `prefline iterate` that was ended goes on in the round where it was, whatever has become
champion since.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.config import changed, stage_key
from pipeline_lib.hashing import canonical_json
from pipeline_lib.schema import ArtifactRef, Verdict
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pipeline_lib.stages.run_config import RunConfig

VERSION = 1

_STAGE = "round"
_FILE = "round.json"
_FIXED = ("name", "runtime", "iterate", "model", "filter.split", "promote.model_name")
"""Keys that no round may change: what is compared across rounds, and which prompts are held out."""


class IterateConfig(Frozen):
    """Further rounds of the whole loop, which `prefline iterate` runs."""

    start_from: Literal["champion", "last_candidate"] = "champion"
    """The model that a further round starts from: the champion, or the best candidate even if none passed."""
    retrain: tuple[Literal["sft", "reward"], ...] = ("reward",)
    """What is trained again in each further round, besides the candidates."""
    changes: tuple[dict[str, object], ...] = ()
    """By dotted key, what the second, third, ... round changes, e.g. its sources; the last holds from there on."""

    @model_validator(mode="after")
    def _leaves_the_measure_alone(self) -> Self:
        for number, changes in enumerate(self.changes, start=2):
            for key in changes:
                if any(_overlap(key, fixed) for fixed in _FIXED):
                    raise ValueError(
                        f"iterate.changes of round {number}: {key} is the same in all rounds; "
                        "change sources, candidates or what is trained"
                    )
        return self


class RoundStart(Frozen):
    """What a round goes on from."""

    number: int = Field(1, ge=1)
    """Which round it is."""
    model: ArtifactRef | None = None
    """The model; null in the first round: the base model."""
    reward_model: ArtifactRef | None = None
    """The reward model of the round before."""

    def label(self, name: str) -> str:
        """Return the name of the round's report and of its parent run."""
        return f"{name}-round-{self.number}"


class RoundResult(Frozen):
    """What a round came to."""

    start: RoundStart
    status: str
    """What promotion did."""
    reason: str
    model: ArtifactRef | None
    """What the next round starts from; null: the base model again."""
    artifacts: dict[str, ArtifactRef]
    """Data set, SFT model, reward model, verdict, report and candidates of the round, by role."""

    def next_start(self) -> RoundStart:
        """Return what the next round goes on from."""
        return RoundStart(
            number=self.start.number + 1, model=self.model, reward_model=self.artifacts.get("reward_model")
        )


def config_of_round(config: RunConfig, number: int) -> RunConfig:
    """Return the configuration of round `number`, counted from 1.

    Raises:
        ConfigError: A change names a key that is not there, or a value that does not fit.
    """
    if number == 1 or not config.iterate.changes:
        return config
    place = min(number - 2, len(config.iterate.changes) - 1)
    return changed(config, config.iterate.changes[place], where=f"iterate.changes.{place}")


def model_of_next_round(
    config: IterateConfig, verdict: Verdict, start: RoundStart, promoted: ArtifactRef | None
) -> ArtifactRef | None:
    """Choose what the next round starts from.

    Args:
        config: The schedule.
        verdict: The gate's decision in this round.
        start: What this round started from.
        promoted: The model that this round made champion, or that was champion already.
    """
    if config.start_from == "champion":
        return promoted or verdict.champion or start.model
    ranked = [each for each in verdict.candidates if each.rank_value is not None]
    if verdict.winner is not None:
        return verdict.candidate(verdict.winner).model
    best = max(ranked, key=lambda each: each.rank_value or 0.0, default=verdict.candidates[-1])
    return best.model


def find_round(store: ArtifactStore, config: RunConfig, start: RoundStart) -> RoundResult | None:
    """Return what an equal round came to, where it was finished before."""
    found = store.find(_key(config, start))
    return None if found is None else RoundResult.model_validate(store.read_json(found, _FILE))


def record_round(store: ArtifactStore, config: RunConfig, result: RoundResult) -> ArtifactRef:
    """Commit what a round came to; its inputs are what it made, so its lineage is the whole round."""
    directory = Path(tempfile.mkdtemp(prefix="prefline-round-"))
    try:
        (directory / _FILE).write_bytes(canonical_json(result.model_dump(mode="json")))
        return store.commit(
            directory, kind=_STAGE, stage=_STAGE, stage_version=VERSION, config=_settings(config),
            inputs=result.artifacts, metrics={"round": float(result.start.number)}, measurements={},
            stage_key=_key(config, result.start),
        )  # fmt: skip
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _RoundConfig(Frozen):
    config: dict[str, Any]
    start: RoundStart


def _overlap(first: str, second: str) -> bool:
    """Tell whether one dotted key is the other or lies in it."""
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")


def _settings(config: RunConfig) -> dict[str, Any]:
    # Later rounds' changes are no part of this one: they may be written while the rounds run.
    return config.model_dump(mode="json", exclude={"runtime": True, "iterate": {"changes"}})


def _key(config: RunConfig, start: RoundStart) -> str:
    return stage_key(_STAGE, VERSION, _RoundConfig(config=_settings(config), start=start), {})
