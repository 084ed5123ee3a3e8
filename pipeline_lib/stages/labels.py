"""Stage `labels`: a judge or people rank the responses of a round, in the place of the reward model.

It comes between the sampling of a round and its training, where a candidate's `labels` say so. The result
is a data set like that of stage `rollouts`, with `agreement.json`: how far the labels agree with the reward
model, with labels of people where there are some, and a judge with itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.data.record_files import write_json
from pipeline_lib.errors import DataError, LabelsWantedError
from pipeline_lib.feedback.agreement import agreement, preferred
from pipeline_lib.feedback.annotation import LabelItem, read_labels, write_items
from pipeline_lib.feedback.answers import ChatEndpoint
from pipeline_lib.feedback.questions import Asking, Form, Scale
from pipeline_lib.hashing import derive_seed, sha256_bytes, sha256_file
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.rollout_rows import Compared, SampledPrompt, ScoredResponse, Selection
from pipeline_lib.stages.rollouts import SAMPLES, write_rows
from pipeline_lib.validation import Frozen

VERSION = 1

Scores = tuple[float | None, ...]
"""One a response, higher is better; None where nobody said anything of it."""


class RewardModelLabels(Frozen):
    """The scores that the responses have already: of the reward model, or of `sampling.rewards`."""

    name: Literal["reward_model"] = "reward_model"


class JudgeLabels(Frozen):
    """A language model is asked about the responses, in both orders.

    Source: Zheng et al. 2023 (arXiv 2306.05685).
    """

    name: Literal["judge"] = "judge"
    endpoint: ChatEndpoint | None = None
    """The language model; null where `recorded` is given."""
    recorded: str | None = None
    """JSON lines `{"key": ..., "answer": ...}`; the key is the sha256 of the question's text."""
    form: Form = "pair"
    """pair: two at a time, [[A]], [[B]] or [[C]]; rank: all at once, [[2 > 1 = 3]]; rate: all at once, [[7, 3]]."""
    scale: Scale = "1-10"
    """Marks of `rate`."""
    question: str | None = None
    """File with other words; {conversation}, {answers}, {count}, {scale} and {example} are filled in."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens where a question gets no answer: the stage stops, or goes on without a verdict."""
    min_read_frac: float = Field(0.5, gt=0, le=1)
    """Stop where fewer of the questions than this share got a verdict that can be read."""
    gold: str | None = None
    """File that people labelled, which the judge is compared with; it changes no label."""

    @model_validator(mode="after")
    def _has_one_judge(self) -> Self:
        if (self.endpoint is None) == (self.recorded is None):
            raise ValueError("give one of endpoint and recorded")
        return self

    @property
    def asking(self) -> Asking:
        """How is asked, with its words."""
        return Asking.of(self.form, self.scale, self.question)

    def fingerprints(self) -> dict[str, str]:
        """Return the sha256 of the words that are asked, and of the files that are read.

        Raises:
            ConfigError: The words are not there, or show no answers.
        """
        files = (place for place in (self.recorded, self.gold) if place is not None)
        return {
            "question": sha256_bytes(self.asking.template.encode()),
            **{place: _sha256_at(place) for place in files},
        }


class PeopleLabels(Frozen):
    """People rank the responses in a file: the run stops there, and goes on where the file is labelled."""

    name: Literal["people"] = "people"
    directory: str = "labels"
    """Folder of the files, one a round; each is named after the candidate, the round and the samples."""


Labels = Annotated[RewardModelLabels | JudgeLabels | PeopleLabels, Field(discriminator="name")]
"""Who says which response is better."""


class LabelsConfig(Frozen):
    """Labelling of one round."""

    labels: Annotated[JudgeLabels | PeopleLabels, Field(discriminator="name")]
    """Who labels."""
    file: str = ""
    """The file that people label."""
    select: Selection = "best_of_prompt"
    """Demonstrations: the best response of each prompt, or the best share of all responses."""
    top_frac: float = Field(0.2, gt=0, le=1)
    """The share, of `top_share`."""
    compared: Compared = "all"
    """Comparisons: all responses of a prompt, or its best and its worst."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Sha256 of what is read, written when the stage is planned; empty for a file that is not there."""

    def current_fingerprints(self) -> dict[str, str]:
        """Return the sha256 of what is read as it is now."""
        if isinstance(self.labels, PeopleLabels):
            return {self.file: _sha256_at(self.file)}
        return self.labels.fingerprints()


def _sha256_at(place: str) -> str:
    path = Path(place).expanduser()
    return sha256_file(path) if path.is_file() else ""


def pin_labels(config: LabelsConfig) -> LabelsConfig:
    """Return the configuration with the sha256 of what it reads, ready for the stage key."""
    return config.model_copy(update={"fingerprints": config.current_fingerprints()})


@dataclass(frozen=True)
class Shown:
    """A prompt with the responses that are labelled: usable, each text once, in an order that says nothing."""

    sampled: SampledPrompt
    responses: tuple[ScoredResponse, ...]

    @classmethod
    def of(cls, sampled: SampledPrompt) -> Shown:
        """Take a prompt's candidates; the order follows from the texts alone, not from what they scored."""
        place = {each.content: derive_seed(0, "shown", sampled.prompt.id, each.content) for each in sampled.responses}
        return cls(sampled, tuple(sorted(sampled.candidates(), key=lambda each: place[each.content])))

    @property
    def texts(self) -> tuple[str, ...]:
        """The responses."""
        return tuple(each.content for each in self.responses)

    @property
    def item(self) -> LabelItem:
        """What people are shown."""
        return LabelItem(self.sampled.prompt.messages, self.texts)

    def labelled(self, scores: Scores) -> SampledPrompt | None:
        """Return the prompt with the responses that have a label; None where none has."""
        pairs = zip(self.responses, scores, strict=True)
        kept = tuple(each.model_copy(update={"score": score}) for each, score in pairs if score is not None)
        return self.sampled.model_copy(update={"responses": kept}) if kept else None

    def verdicts(self, scores: Scores) -> dict[tuple[int, int], tuple[float, float]]:
        """Return what labels and scores say of each pair with two labels: 1, 0.5 or 0 for the first."""
        found = {}
        for i, j in combinations(range(len(scores)), 2):
            first, second = scores[i], scores[j]
            if first is not None and second is not None:
                theirs = preferred(self.responses[i].score, self.responses[j].score)
                found[i, j] = (preferred(first, second), theirs)
        return found


def run(config: LabelsConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Label; input `rollouts`, output kind `dataset`.

    Raises:
        LabelsWantedError: People have not labelled the file, or not all of it.
        JudgeError: The judge cannot be asked, or too few of its answers can be read.
        DataError: A file cannot be read, or has changed since the stage was planned.
    """
    if config.current_fingerprints() != config.fingerprints:
        raise DataError(
            "the files of labels are not what they were when the stage was planned",
            next_step="run again: the stage is planned anew with the files as they are",
        )
    lines = context.store.read_lines(inputs["rollouts"], SAMPLES)
    shown = [each for each in (Shown.of(SampledPrompt.model_validate_json(line)) for line in lines) if each.responses]
    figures: dict[str, Any]
    if isinstance(config.labels, PeopleLabels):
        scores, figures = _by_people(config, shown), {}
    else:
        from pipeline_lib.stages.label_judge import ask_judge  # noqa: PLC0415  (it knows the classes here)

        scores, figures = ask_judge(config.labels, shown, context)
    figures |= {"with_reward_model": _with_reward_model(shown, scores)}
    return _write(config, inputs, context, shown, scores, figures)


def _by_people(config: LabelsConfig, shown: Sequence[Shown]) -> list[Scores]:
    """Return minus the rank of each response."""
    items = [each.item for each in shown if len(each.responses) >= 2]
    ranks: Mapping[str, tuple[int, ...] | None] = {}
    if items:
        path = Path(config.file).expanduser()
        if not path.is_file():
            write_items(path, items)
        found = read_labels(path, items)
        if found.waiting:
            raise LabelsWantedError(
                f"{len(found.waiting)} of {len(items)} rows of {path} wait for labels; the first: {found.waiting[0]}",
                next_step="write into each row `ranks`, one number a response, 1 for the best and equal numbers for "
                "ties (or `skip`: true), then run the same command: it goes on from here",
            )
        ranks = found.ranks
    scores: list[Scores] = []
    for each in shown:
        given = ranks[each.item.key] if len(each.responses) >= 2 else (1,)
        scores.append((None,) * len(each.responses) if given is None else tuple(float(-rank) for rank in given))
    return scores


def _with_reward_model(shown: Sequence[Shown], scores: Sequence[Scores]) -> dict[str, Any]:
    verdicts = [pair for each, own in zip(shown, scores, strict=True) for pair in each.verdicts(own).values()]
    return agreement(verdicts).figures()


def _write(
    config: LabelsConfig,
    inputs: Inputs,
    context: StageContext,
    shown: Sequence[Shown],
    scores: Sequence[Scores],
    figures: dict[str, Any],
) -> StageOutput:
    labelled = [each.labelled(own) for each, own in zip(shown, scores, strict=True)]
    kept = [each for each in labelled if each is not None]
    if not kept:
        raise DataError(
            f"none of {len(shown)} prompts has a label", next_step="label some of them, or ask another judge"
        )
    num_comparisons, num_demonstrations = write_rows(
        context, inputs["rollouts"], kept, compared=config.compared, select=config.select, top_frac=config.top_frac
    )
    counts = {
        "prompts": len(shown), "prompts_labelled": len(kept), "comparisons": num_comparisons,
        "demonstrations": num_demonstrations,
    }  # fmt: skip
    write_json(context.workdir / "agreement.json", {"labels": config.labels.name, **counts, **figures})
    write_json(context.workdir / "summary.json", counts)
    flat = {
        **counts,
        **{name: value for name, value in _flat(figures).items() if isinstance(value, int | float | None)},
    }
    return StageOutput(
        "dataset", context.workdir, {name: None if value is None else float(value) for name, value in flat.items()}
    )


def _flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in figures.items():
        found |= _flat(value, f"{prefix}{name}_") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
