"""Sampled and scored responses into rows: comparisons for preference stages, demonstrations for SFT."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field

from pipeline_lib.errors import DataError
from pipeline_lib.schema import Author, Record, Response, Split
from pipeline_lib.validation import Frozen

Selection = Literal["best_of_prompt", "top_share"]
Compared = Literal["all", "best_and_worst"]


class ScoredResponse(Frozen):
    """One sampled response and what the reward model gave it."""

    content: str
    author: Author
    score: float = Field(allow_inf_nan=False)
    """Normalised, after the rule for responses that did not end by themselves."""
    num_tokens: int
    is_finished: bool
    """True where the response ended by itself."""
    is_usable: bool = True
    """False where the text is empty or holds control strings: it is counted, and no row is made of it."""


class SampledPrompt(Frozen):
    """A prompt with all the responses that were sampled for it, in the order of sampling."""

    prompt: Record
    """The row that the prompt comes from, without its responses."""
    responses: tuple[ScoredResponse, ...]

    def candidates(self) -> list[ScoredResponse]:
        """Return the usable responses, the best first; of equal texts the best one, of equal scores the first."""
        best: dict[str, ScoredResponse] = {}
        for each in sorted(self.responses, key=lambda each: -each.score):
            if each.is_usable:
                best.setdefault(each.content, each)
        return list(best.values())


def with_earlier(new: Sequence[SampledPrompt], earlier: Iterable[SampledPrompt]) -> list[SampledPrompt]:
    """Add this round's responses to those of earlier rounds, prompt by prompt, the earlier ones first."""
    found = {each.prompt.id: each for each in earlier}
    for each in new:
        before = found.get(each.prompt.id)
        responses = each.responses if before is None else (*before.responses, *each.responses)
        found[each.prompt.id] = SampledPrompt(prompt=each.prompt, responses=responses)
    return list(found.values())


def comparison(sampled: SampledPrompt, *, compared: Compared) -> Record:
    """Return a prompt's responses ranked by score; the bare prompt where there are no two that differ in score."""
    best_first = sampled.candidates()
    if compared == "best_and_worst":
        best_first = best_first[:1] + best_first[1:][-1:]
    scores = [each.score for each in best_first]
    if len(set(scores)) < 2:
        return sampled.prompt
    ranks = tuple(1 + sum(other > score for other in scores) for score in scores)
    return _row(sampled.prompt, tuple(_response(each) for each in best_first), ranks, split=Split.POLICY)


def demonstrations(rows: Sequence[SampledPrompt], *, select: Selection, top_frac: float) -> list[Record]:
    """Return what SFT trains on.

    Args:
        rows: Prompts with their responses.
        select: `best_of_prompt` takes each prompt's best response (RAFT, algorithm 1); `top_share` the
            best `int(top_frac * samples)` of all samples, whatever their prompts (LMFlow).
        top_frac: See `select`; at least one response is taken.

    Raises:
        DataError: There is no usable response at all.
    """
    candidates = [(each, row.prompt) for row in rows for each in row.candidates()]
    if not candidates:
        raise DataError(
            f"none of the responses sampled for {len(rows)} prompts is usable: all are empty or hold control strings",
            next_step="start from a model after SFT, or lower the temperature",
        )
    if select == "best_of_prompt":
        chosen = [(best[0], row.prompt) for row in rows if (best := row.candidates())]
    else:
        num_samples = sum(len(row.responses) for row in rows)
        # Stable: of equal scores the first sampled ones.
        ordered = sorted(candidates, key=lambda pair: -pair[0].score)
        chosen = ordered[: max(1, int(top_frac * num_samples))]
    return [_row(prompt, (_response(each),), (), split=Split.SFT) for each, prompt in chosen]


def _row(prompt: Record, responses: tuple[Response, ...], ranks: tuple[int, ...], *, split: Split) -> Record:
    return Record.create(
        prompt.messages, responses, ranks, origin=prompt.origin, group=prompt.group, split=split, tags=prompt.tags
    )


def _response(each: ScoredResponse) -> Response:
    return Response(content=each.content, author=each.author, score=each.score)
