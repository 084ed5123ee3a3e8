"""Every record that travels between stages, and the reference by which artifacts are named.

Records are rows of JSONL. A row's id is the sha256 of its canonical content (texts and what people
said of them), so the same row has the same id wherever it was read.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.hashing import sha256_json
from pipeline_lib.validation import Frozen

Role = Literal["system", "user", "assistant"]
Strength = Literal["significantly", "better", "slightly", "unsure"]
"""How much better the better response is, in LLaMA-2's four words."""


class ArtifactRef(Frozen):
    """The name of an immutable artifact: its kind, and the sha256 of its manifest's content part."""

    kind: str
    id: str = Field(pattern="^[0-9a-f]{64}$")

    def __str__(self) -> str:
        """Return `kind/sha12`, the short form for people."""
        return f"{self.kind}/{self.id[:12]}"


class Message(Frozen):
    """One turn of a dialogue."""

    role: Role
    content: str


class Author(Frozen):
    """Who or what wrote a response."""

    kind: Literal["human", "documentation", "model", "unknown"] = "unknown"
    name: str = ""
    """A person's pseudonym, a document's place, or a model artifact's id."""
    sampling: dict[str, float | int | str] = Field(default_factory=dict)
    """Sampling parameters, where a model wrote it."""


class Response(Frozen):
    """One answer to a prompt: the text of the last assistant turn."""

    content: str
    author: Author = Author()
    score: float | None = Field(None, allow_inf_nan=False)
    """What people gave it (a rating, upvotes), or the reward model of a rollout; higher is better."""


class Origin(Frozen):
    """Where a row came from."""

    source: str
    """Name of the source in the configuration."""
    license: str = "unknown"
    place: str = ""
    """File, URI or module; with `line`, enough to find the row again."""
    line: int | None = None
    """Line or row number, from 1."""


class Split(StrEnum):
    """What a prompt may be used for. One prompt has one split, for all stages."""

    SFT = "sft"
    REWARD = "reward"
    POLICY = "policy"
    """Prompts and pairs of the policy stages (DPO, PPO)."""
    REWARD_TEST = "reward_test"
    GATE = "gate"
    """Held-out rows that only evaluation sees."""


class Record(Frozen):
    """A prompt with 0 responses (prompt only), 1 (demonstration, or rated) or K >= 2 (comparison).

    `ranks[k]` is the place of `responses[k]`, 1 the best, equal numbers are ties.
    """

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    """The prompt: ends with a user turn."""
    responses: tuple[Response, ...] = ()
    ranks: tuple[int, ...] = ()
    origin: Origin
    group: str = ""
    """Rows with the same group share a split (the paraphrases of one question, one dialogue)."""
    split: Split | None = None
    """Set by the filter stage."""
    strength: Strength | None = None
    """How much better the better response is, where somebody said so."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How much the row counts, e.g. the share of annotators that agree."""
    tags: tuple[str, ...] = ()
    """What the row is about, e.g. `helpful` or `safe`; training stages select rows by them."""
    desirable: bool | None = None
    """Whether people want the one response or not; None: it is a demonstration, or there is not one."""

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("the prompt must end with a user turn")
        if len(self.responses) >= 2 and len(self.ranks) != len(self.responses):
            raise ValueError(f"{len(self.responses)} responses need {len(self.responses)} ranks")
        if len(self.responses) < 2 and self.ranks:
            raise ValueError("ranks are for two or more responses")
        if self.desirable is not None and len(self.responses) != 1:
            raise ValueError("a label of desirable or not is for one response")
        if self.strength is not None and len(self.responses) < 2:
            raise ValueError("a strength of preference is for two or more responses")
        return self

    @classmethod
    def create(
        cls,
        messages: tuple[Message, ...],
        responses: tuple[Response, ...] = (),
        ranks: tuple[int, ...] = (),
        *,
        origin: Origin,
        group: str = "",
        split: Split | None = None,
        strength: Strength | None = None,
        weight: float = 1.0,
        tags: tuple[str, ...] = (),
        desirable: bool | None = None,
    ) -> Self:
        """Make a record whose id is the sha256 of its texts, its ranks and what else people said.

        Tags are no part of the id, nor is the origin: they say where a row belongs, not what it is.
        """
        content: dict[str, Any] = {
            "messages": [[message.role, message.content] for message in messages],
            "responses": [response.content for response in responses],
            "ranks": list(ranks),
        }
        # Only where it is there, so that rows without it keep the id they always had.
        if any(response.score is not None for response in responses):
            content["scores"] = [response.score for response in responses]
        if strength is not None:
            content["strength"] = strength
        if weight != 1.0:
            content["weight"] = weight
        if desirable is not None:
            content["desirable"] = desirable
        return cls(
            id=sha256_json(content), messages=messages, responses=responses, ranks=ranks,
            origin=origin, group=group or prompt_id(messages), split=split,
            strength=strength, weight=weight, tags=tags, desirable=desirable,
        )  # fmt: skip

    @property
    def kind(self) -> Literal["prompt", "demonstration", "rated", "comparison"]:
        """What the row is, by its number of responses and whether one is labelled."""
        if not self.responses:
            return "prompt"
        if self.desirable is not None:
            return "rated"
        return "demonstration" if len(self.responses) == 1 else "comparison"


def prompt_id(messages: tuple[Message, ...]) -> str:
    """Return the sha256 of a prompt's canonical content as 64 hex digits."""
    return sha256_json([[message.role, message.content] for message in messages])


class Rejection(Frozen):
    """A row that was not accepted: where it was, what was wrong, and the row itself."""

    code: str
    """Stable reason, e.g. `E_TRUNCATED_ROW`."""
    reason: str
    """One line for people."""
    stage: str
    """What refused it: a reader, or the name of a filter rule."""
    origin: Origin
    byte_offset: int | None = None
    """Offset of the row's first byte in the decompressed file."""
    excerpt: str = ""
    """At most 200 characters of the raw row, control characters escaped."""
    record: Record | None = None
    """The parsed row, where it could be parsed."""


class FunnelStep(Frozen):
    """What one reader or rule did to the rows that reached it: rows in = kept + rejected."""

    name: str
    rows_in: int
    rows_kept: int
    rejected: dict[str, int] = Field(default_factory=dict)
    """Rows refused, by code."""


class ExampleResult(Frozen):
    """One model on one held-out prompt. The unit over which every interval is computed."""

    record_id: str
    prompt: tuple[Message, ...]
    reference: str
    """The held-out demonstration's answer; empty where the row has none."""
    response: str
    """The model's own answer."""
    response_tokens: int
    is_finished: bool
    """True where the response ended by itself, False where it was cut at the token limit."""
    reference_nll_nats: float | None
    """Negative log-likelihood of the reference answer, summed over its tokens."""
    reference_tokens: int
    rouge_l_frac: float | None
    """ROUGE-L F1 of the response against the reference."""
    score: float | None
    """Reward-model score of the response."""
    logp: float | None
    """Log-probability of the response under the model, temperature 1."""
    reference_model_logp: float | None
    """Log-probability of the response under the reference (the SFT model)."""


class Interval(Frozen):
    """An estimate with its confidence interval. Not finite means: could not be estimated."""

    value: float | None
    low: float | None
    high: float | None
    confidence_frac: float
    num_examples: int


class RuleResult(Frozen):
    """One gate rule applied to one candidate."""

    rule: str
    """The rule in words, e.g. `rouge_l against base: lower bound at least 0.0`."""
    metric: str
    against: str | None = None
    """The model compared with, `None` for an absolute figure."""
    unit: str = ""
    estimate: Interval
    threshold: float
    status: Literal["pass", "fail", "not_applicable"]
    reason: str
    """One line: why it passed, failed or does not apply."""


class CandidateVerdict(Frozen):
    """Every rule's outcome for one candidate."""

    name: str
    """Its name in the run, e.g. `dpo`."""
    model: ArtifactRef
    is_passed: bool
    rules: tuple[RuleResult, ...]
    rank_value: float | None
    """The figure by which passing candidates are ordered; higher is better."""


class Verdict(Frozen):
    """The gate's decision over all candidates of a run."""

    candidates: tuple[CandidateVerdict, ...]
    winner: str | None
    """Name of the best candidate that passed every rule, `None` where none did."""
    champion: ArtifactRef | None
    """The model that was champion when the evidence was weighed."""
    policy: dict[str, Any]
    """The gate policy as applied."""

    def candidate(self, name: str) -> CandidateVerdict:
        """Return the verdict over one candidate.

        Raises:
            KeyError: No candidate has this name.
        """
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)
