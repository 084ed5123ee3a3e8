"""Whether a response is safe at all, beside which one is better. Legend: K responses of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = ("best_safe_tags", "all_safe_tags", "none_safe_tags")


class Safety(Frozen):
    """+ coef * the mean over labelled responses of the cross-entropy of sigma(score) with their being safe.

    LLaMA-2's annotators say of a pair that the preferred response is safe and the other is not, that
    both are, or that neither is; a row's tags say which. The score itself is the classification's logit, so
    that sigma(score) is the probability which the threshold of the reward `llama2` is about.

    Source: Touvron et al. 2023 (arXiv 2307.09288), A.3.4, which prints no formula.
    """

    coef: float = Field(1.0, gt=0)
    """Weight of the classification beside the loss on comparisons."""
    best_safe_tags: tuple[str, ...] = ("best-safe",)
    """In rows with one of these tags the best response is safe and the others are not."""
    all_safe_tags: tuple[str, ...] = ("all-safe",)
    """In rows with one of these every response is safe."""
    none_safe_tags: tuple[str, ...] = ("none-safe",)
    """In rows with one of these no response is."""

    @model_validator(mode="after")
    def _tags_say_one_thing(self) -> Self:
        tags = [tag for kind in _KINDS for tag in getattr(self, kind)]
        double = sorted({tag for tag in tags if tags.count(tag) > 1})
        if double:
            raise ValueError(f"safety: the tag {double[0]!r} is named twice")
        return self

    def labels(self, ranks: Sequence[int], tags: Sequence[str]) -> tuple[bool, ...]:
        """Return whether each response of a row is safe; empty where its tags do not say.

        Args:
            ranks: 1 the best, equal numbers are ties.
            tags: The row's.

        Raises:
            ValueError: The tags say two things.
        """
        best_safe, all_safe, none_safe = (not set(getattr(self, kind)).isdisjoint(tags) for kind in _KINDS)
        if best_safe + all_safe + none_safe > 1:
            raise ValueError(f"the tags {', '.join(tags)} say two things of what is safe")
        if best_safe:
            return tuple(rank == min(ranks) for rank in ranks)
        return (all_safe,) * len(ranks) if all_safe or none_safe else ()

    def of_prompt(self, scores_K: Tensor, is_safe: Sequence[bool], *, weight: float = 1.0) -> Tensor:
        """Return weight * coef * the sum over a prompt's responses; a step is divided by its labelled responses.

        Raises:
            ValueError: There is not one label a score.
        """
        from pipeline_lib.losses.reward.pairs import safety_classification  # noqa: PLC0415  (configuration: no torch)

        is_safe_K = scores_K.new_tensor(list(is_safe)).bool()
        return weight * self.coef * safety_classification(scores_K, is_safe_K).sum()
