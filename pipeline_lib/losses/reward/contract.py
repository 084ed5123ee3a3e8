"""What a reward loss is: a sum out of the scores of a prompt's K responses, and what to divide it by.

A step's loss is the sum of the first figures over the sum of the second over all its prompts, so that
neither the cut into micro-batches nor the number of processes changes it. Rows count by their weight.

Legend: K responses of a prompt, P its pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor

MARGINS = {
    "none": {},
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "unsure": 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "unsure": 0.0},
}
"""LLaMA-2's margins by how much better the better response is (Touvron et al. 2023, table 27)."""


class RewardLoss(Protocol):
    """A frozen class whose fields are the loss's parameters."""

    def of_prompt(
        self, scores_K: Tensor, rank_K: Tensor, *, strength: str | None = None, weight: float = 1.0
    ) -> tuple[Tensor, float]:
        """Return the weighted loss of a prompt, a scalar with gradient, and what it adds to the step's divisor.

        Args:
            scores_K: The reward model's scores, K >= 2, in any order.
            rank_K: Whole numbers, 1 the best; equal ranks are ties.
            strength: How much better the better response is, where the row says so.
            weight: The row's weight, e.g. its annotators' agreement.
        """


class PairTerms(Frozen):
    """The parameters of losses that compare two responses at a time."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels."""
    margins: Literal["none", "small", "large"] = "none"
    """LLaMA-2's margin by the row's strength: small is 1, 2/3, 1/3, 0; large is 3, 2, 1, 0. Rows without one have 0."""
    centring: float = Field(0.0, ge=0)
    """Weight of (better + worse)^2, which keeps scores around 0."""

    def margin(self, strength: str | None) -> float:
        """Return the margin that a row's strength asks for.

        Raises:
            ValueError: The strength is none of LLaMA-2's four.
        """
        if self.margins == "none" or strength is None:
            return 0.0
        known = MARGINS[self.margins]
        if strength not in known:
            raise ValueError(f"strength {strength!r} is none of {', '.join(known)}")
        return known[strength]

    def per_pair(self, better_P: Tensor, worse_P: Tensor, *, margin_P: Tensor | None = None) -> Tensor:
        """Return -(1 - e) log sigma(x) - e log sigma(-x) + centring, x = better - worse - margin, of many pairs.

        Args:
            better_P: Scores of the preferred responses, of any prompts.
            worse_P: Scores of the others.
            margin_P: Each pair's margin, as `margin` gives it; None is 0.

        Returns:
            One loss a pair, unweighted, `(P,)`.
        """
        from pipeline_lib.losses.reward.pairs import bradley_terry  # noqa: PLC0415  (configuration needs no torch)

        loss_P = bradley_terry(better_P, worse_P, margin_P=margin_P, centring=self.centring)
        if not self.label_smoothing:
            return loss_P
        # log sigma(-x) = log sigma(x) - x.
        apart_P = better_P - worse_P if margin_P is None else better_P - worse_P - margin_P
        return loss_P + self.label_smoothing * apart_P

    def of_ranks(self, scores_K: Tensor, rank_K: Tensor, strength: str | None) -> Tensor:
        """Return the loss of every (better, worse) pair of a prompt, `(P,)`; ties are dropped.

        Raises:
            ValueError: Scores and ranks are not `(K,)` with K of 2 or more.
        """
        check(scores_K, rank_K)
        better_P, worse_P = (rank_K[:, None] < rank_K[None, :]).nonzero(as_tuple=True)
        margin = self.margin(strength)
        margin_P = scores_K.new_full((len(better_P),), margin) if margin else None
        return self.per_pair(scores_K[better_P], scores_K[worse_P], margin_P=margin_P)


def check(scores_K: Tensor, rank_K: Tensor) -> None:
    """Refuse what is no list of responses.

    Raises:
        ValueError: Scores and ranks are not `(K,)` with K of 2 or more.
    """
    if scores_K.ndim != 1 or scores_K.shape != rank_K.shape or len(scores_K) < 2:
        raise ValueError(
            f"scores {tuple(scores_K.shape)} and ranks {tuple(rank_K.shape)} must be (K,) with K of 2 or more"
        )
