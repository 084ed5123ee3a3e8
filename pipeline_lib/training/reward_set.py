"""A weighted set of reward sources: what is configured, and what scores and remembers.

score = sum over parts of weight * clip(normalise(source's number)). Every part is a figure of its own.
Light until something is scored: a configuration imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from pipeline_lib.errors import RewardError
from pipeline_lib.registry import PluginSpec
from pipeline_lib.training.rewards import REWARD_SOURCES
from pipeline_lib.training.rewards.contract import (
    ReadsFiles,
    Resources,
    RewardSource,
    Sample,
    UsesRewardModels,
)
from pipeline_lib.training.running_moments import RunningMoments
from pipeline_lib.validation import Frozen, validate

MAX_ROWS_NAMED = 5
"""Rows that an error names, each with its reason."""
MAIN_REWARD_MODEL = "reward"
"""Name of the reward model that every run has."""


class Weighting(Frozen):
    """How the numbers of one source come into the sum; these keys stand beside the source's own."""

    label: str | None = Field(None, pattern="^[a-z0-9][a-z0-9_-]{0,30}$")
    """Name of the part in figures `reward/<label>`; null: the source's name."""
    weight: float = 1.0
    """What its numbers are multiplied by; negative for a penalty."""
    clip: tuple[float, float] | None = None
    """Lowest and highest number, after normalisation; null: none."""
    normalize: Literal["none", "running"] = "none"
    """running: by mean and deviation of all its numbers so far, those of the iteration included."""

    @model_validator(mode="after")
    def _clips_to_a_range(self) -> Self:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip = {list(self.clip)}: the first number must be below the second")
        return self


def split_part(spec: Mapping[str, Any]) -> tuple[Weighting, RewardSource]:
    """Return a part's weighting and its source.

    Raises:
        ConfigError: A key or value of either cannot be used.
    """
    own = {key: value for key, value in spec.items() if key in Weighting.model_fields}
    weighting = validate(Weighting, own, where=f"reward {spec.get('name')!r}")
    source = REWARD_SOURCES.build({key: value for key, value in spec.items() if key not in own})
    assert isinstance(source, RewardSource)
    return weighting, source


def _complete(spec: PluginSpec) -> PluginSpec:
    """Check a part and write its defaults out, so that the stage key sees them."""
    weighting, source = split_part(spec)
    assert isinstance(source, BaseModel)
    filled = weighting.model_copy(update={"label": weighting.label or spec["name"]})
    return {"name": spec["name"], **source.model_dump(mode="json"), **filled.model_dump(mode="json")}


class RewardSet(Frozen):
    """Where a response's score comes from: a weighted sum of sources."""

    parts: tuple[Annotated[PluginSpec, AfterValidator(_complete)], ...] = Field(
        ({"name": "reward_model"},), min_length=1, validate_default=True
    )
    """Sources with their parameters and `weight`, `clip`, `normalize`, `label`; `prefline list rewards` prints them."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens where a source cannot score a response: the stage stops, or leaves that response out."""
    min_scored_frac: float = Field(0.5, gt=0, le=1)
    """With skip: stop where fewer of an iteration's responses than this share could be scored."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Sha256 of the files that sources read, written when a run is planned."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        labels = [part["label"] for part in self.parts]
        double = sorted({label for label in labels if labels.count(label) > 1})
        if double:
            raise ValueError(f"parts: {double[0]!r} is there twice; give each a `label` of its own")
        return self

    @property
    def reward_models(self) -> tuple[str, ...]:
        """Names of the reward models that the sources ask, sorted."""
        sources = (split_part(part)[1] for part in self.parts)
        return tuple(
            sorted(
                {name for source in sources if isinstance(source, UsesRewardModels) for name in source.reward_models}
            )
        )

    def current_fingerprints(self) -> dict[str, str]:
        """Return the sha256 of the files that sources read as they are now.

        Raises:
            ConfigError: A file is not there, or a function is not allowed.
        """
        found: dict[str, str] = {}
        for part in self.parts:
            source = split_part(part)[1]
            if isinstance(source, ReadsFiles):
                found |= source.fingerprints()
        return found


@dataclass(frozen=True)
class Rewards:
    """The scores of some samples and what they are made of, in the samples' order."""

    scores: tuple[float | None, ...]
    """None where a source could not score the sample, and the set says to skip it."""
    parts: dict[str, tuple[float, ...]]
    """By label: the source's own numbers, before normalisation, clip and weight; NaN where it has none."""
    figures: dict[str, float]
    """`reward/...` of the iteration: each part's mean and deviation, its contribution, the sum, the share scored."""


@dataclass
class RewardScorer:
    """Scores samples with a set, and holds what it learned of earlier ones."""

    rewards: RewardSet
    resources: Resources = field(default_factory=Resources)
    moments: dict[str, RunningMoments] = field(default_factory=dict)
    """By label, of the parts that are normalised."""

    def score(self, samples: Sequence[Sample]) -> Rewards:
        """Score an iteration's samples, and count them into the running moments.

        Raises:
            RewardError: A source could not score a sample and the set says to stop, or too few were
                scored; the rows and reasons are named. The running moments are then as before.
        """
        parts: dict[str, tuple[float | None, ...]] = {}
        figures: dict[str, float] = {}
        weightings: dict[str, Weighting] = {}
        problems: dict[str, list[tuple[Sample, str]]] = {}
        for spec in self.rewards.parts:
            weighting, source = split_part(spec)
            label = spec["label"]
            weightings[label] = weighting
            parts[label] = self._ask(label, source, samples, figures, problems)
        is_scored = [all(numbers[place] is not None for numbers in parts.values()) for place in range(len(samples))]
        self._require_enough(samples, is_scored, problems)
        totals: list[float | None] = [0.0 if scored else None for scored in is_scored]
        for label, numbers in parts.items():
            worth = self._worth(label, weightings[label], numbers, is_scored, figures)
            totals = [None if total is None else total + value for total, value in zip(totals, worth, strict=True)]
        figures |= _spread("reward/total", [total for total in totals if total is not None])
        figures["reward/scored_frac"] = sum(is_scored) / len(samples)
        plain = {
            label: tuple(math.nan if number is None else number for number in numbers)
            for label, numbers in parts.items()
        }
        return Rewards(tuple(totals), plain, figures)

    def state(self) -> str:
        """Return what a checkpoint must hold, as JSON."""
        return json.dumps({label: moments.as_list() for label, moments in self.moments.items()}, sort_keys=True)

    def load_state(self, state: str) -> None:
        """Take a checkpoint's state back."""
        self.moments = {label: RunningMoments(*values) for label, values in json.loads(state).items()}

    def _ask(
        self,
        label: str,
        source: RewardSource,
        samples: Sequence[Sample],
        figures: dict[str, float],
        problems: dict[str, list[tuple[Sample, str]]],
    ) -> tuple[float | None, ...]:
        """Return a source's numbers; whatever is no finite number is None, with a reason."""
        reasons: list[tuple[Sample, str]] = problems.setdefault(label, [])
        given = source.score(
            samples,
            replace(
                self.resources,
                on_problem=lambda sample, reason: reasons.append((sample, reason)),
                on_figure=lambda name, value: figures.__setitem__(f"reward/{label}_{name}", value),
            ),
        )
        if len(given) != len(samples):
            raise RewardError(
                f"reward {label!r} gave {len(given)} numbers for {len(samples)} responses",
                next_step="a source returns one number, or None, for each response",
            )
        numbers: list[float | None] = []
        for sample, number in zip(samples, given, strict=True):
            is_odd = number is not None and not math.isfinite(number)
            if is_odd:
                reasons.append((sample, f"{number} is not finite"))
            numbers.append(None if is_odd else number)
        return tuple(numbers)

    def _require_enough(
        self, samples: Sequence[Sample], is_scored: list[bool], problems: dict[str, list[tuple[Sample, str]]]
    ) -> None:
        is_skipped = self.rewards.on_error == "skip"
        if all(is_scored) or (is_skipped and sum(is_scored) / len(samples) >= self.rewards.min_scored_frac):
            for label, reasons in problems.items():
                for sample, reason in reasons:
                    self.resources.on_problem(sample, f"{label}: {reason}")
            return
        label, reasons = next((label, reasons) for label, reasons in problems.items() if reasons)
        named = "; ".join(f"{sample.where}: {reason}" for sample, reason in reasons[:MAX_ROWS_NAMED])
        more = f"; and {len(reasons) - MAX_ROWS_NAMED} more" if len(reasons) > MAX_ROWS_NAMED else ""
        raise RewardError(
            f"reward {label!r} could not score {len(reasons)} of {len(samples)} responses: {named}{more}",
            next_step="correct the source"
            + (", or lower rewards.min_scored_frac" if is_skipped else ", or leave such responses out: on_error: skip"),
        )

    def _worth(
        self,
        label: str,
        weighting: Weighting,
        numbers: Sequence[float | None],
        is_scored: list[bool],
        figures: dict[str, float],
    ) -> list[float]:
        """Normalise, clip and weigh a part; 0 for samples that are not scored."""
        known = [number for number, scored in zip(numbers, is_scored, strict=True) if scored and number is not None]
        figures |= _spread(f"reward/{label}", known)
        if weighting.normalize == "running":
            moments = self.moments.get(label, RunningMoments()).with_values(known)
            self.moments[label] = moments
            known = [moments.normalized(number) for number in known]
        if weighting.clip is not None:
            low, high = weighting.clip
            clipped = [min(high, max(low, number)) for number in known]
            figures[f"reward/{label}_clipped_frac"] = sum(a != b for a, b in zip(clipped, known, strict=True)) / len(
                known
            )
            known = clipped
        worth = [weighting.weight * number for number in known]
        figures[f"reward/{label}_weighted"] = math.fsum(worth) / len(worth)
        rest = iter(worth)
        return [next(rest) if scored else 0.0 for scored in is_scored]


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return {name: mean, f"{name}_std": deviation}
