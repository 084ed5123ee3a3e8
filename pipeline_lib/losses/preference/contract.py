"""What a preference loss is: a value out of sequence log-probabilities, in one of three forms.

`pair` compares a chosen with a rejected response, `list` ranks K responses of one prompt,
`unpaired` judges single responses. Log-probabilities are sums over response tokens in nats, the
end-of-turn token included. Where a loss needs no reference, the reference's fields may be zeros.
The format of the log-probabilities (float64, float32) is kept.

Legend: B pairs or responses, K responses of a prompt, M mismatched prompt-response pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field

from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["pair", "list", "unpaired"]
"""Which of the three inputs a loss takes."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of B pairs."""

    chosen_B: Tensor
    """Under the policy; carries the gradient."""
    rejected_B: Tensor
    ref_chosen_B: Tensor
    """Under the reference."""
    ref_rejected_B: Tensor
    chosen_tokens_B: Tensor
    """Response tokens, for losses that take means."""
    rejected_tokens_B: Tensor
    chosen_nll_B: Tensor | None = None
    """Mean NLL a token of the chosen text, where it counts other tokens than the response's."""
    chosen_kl_B: Tensor | None = None
    """Sum over the chosen response's tokens of KL(policy || reference), with gradient."""
    reward_gap_B: Tensor | None = None
    """Reward of the chosen less that of the rejected response; NaN where a row has no figures."""

    def __post_init__(self) -> None:
        """Refuse shapes that would mix pairs by broadcasting.

        Raises:
            ValueError: The tensors are not all `(B,)`.
        """
        _one_shape(self, self.chosen_B, "every tensor of the pairs must be (B,)")

    @property
    def margin_B(self) -> Tensor:
        """The margin of log-ratios, (logp_w - ref_w) - (logp_l - ref_l), with gradient."""
        return self.chosen_ratio_B - self.rejected_ratio_B

    @property
    def chosen_ratio_B(self) -> Tensor:
        """The log-ratio of the chosen response, logp_w - ref_w."""
        return self.chosen_B - self.ref_chosen_B

    @property
    def rejected_ratio_B(self) -> Tensor:
        """The log-ratio of the rejected response, logp_l - ref_l."""
        return self.rejected_B - self.ref_rejected_B

    @property
    def margin_per_token_B(self) -> Tensor:
        """The margin of log-ratios that are divided by their responses' tokens."""
        return self.chosen_ratio_B / self.chosen_tokens_B - self.rejected_ratio_B / self.rejected_tokens_B

    @property
    def nll_per_token_B(self) -> Tensor:
        """Mean NLL a token of the chosen text: as given, else of the response alone."""
        return -self.chosen_B / self.chosen_tokens_B if self.chosen_nll_B is None else self.chosen_nll_B


@dataclass(frozen=True)
class RankedLogps:
    """Log-probabilities of the K >= 2 responses of one prompt, in any order."""

    logp_K: Tensor
    """Under the policy; carries the gradient."""
    ref_logp_K: Tensor
    """Under the reference."""
    tokens_K: Tensor
    """Response tokens."""
    rank_K: Tensor
    """Whole numbers, 1 the best; equal ranks are ties."""
    reward_K: Tensor
    """Higher is better, in the rows' own unit; -rank where rows carry no figures."""
    target_kl: Tensor | None = None
    """Sum over the best response's tokens of KL(policy || reference), a scalar with gradient."""

    def __post_init__(self) -> None:
        """Refuse shapes that would broadcast, and lists of one.

        Raises:
            ValueError: The tensors are not all `(K,)` with K of 2 or more.
        """
        _one_shape(self, self.logp_K, "every tensor of the list must be (K,)", scalars=("target_kl",))
        if self.logp_K.shape[0] < 2:
            raise ValueError("a list needs K >= 2 responses, not 1")

    @property
    def mean_logp_K(self) -> Tensor:
        """Mean log-probability a token of each response."""
        return self.logp_K / self.tokens_K

    @property
    def is_best_K(self) -> Tensor:
        """True for the best response; for several where they tie."""
        return self.rank_K == self.rank_K.min()

    @property
    def best_logp(self) -> Tensor:
        """Log-probability of the best response; where the best tie, their mean."""
        return self.logp_K[self.is_best_K].mean()

    @property
    def nll_per_token(self) -> Tensor:
        """Mean NLL a token of the best response; where the best tie, their mean."""
        return -self.mean_logp_K[self.is_best_K].mean()

    @property
    def is_better_KK(self) -> Tensor:
        """True at (i, j) where response i is ranked better than response j; ties are not."""
        return self.rank_K[:, None] < self.rank_K[None, :]


@dataclass(frozen=True)
class UnpairedLogps:
    """Log-probabilities of B responses, each desirable or not, and of M mismatched ones."""

    logp_B: Tensor
    """Under the policy; carries the gradient."""
    ref_logp_B: Tensor
    """Under the reference."""
    is_desirable_B: Tensor
    """True for responses to be raised, False for those to be lowered."""
    kl_logp_M: Tensor
    """Policy's log-probability of responses to prompts of other rows, for KTO's z0."""
    kl_ref_logp_M: Tensor
    """The reference's."""
    tokens_B: Tensor | None = None
    """Response tokens; needed by the SFT term alone."""

    def __post_init__(self) -> None:
        """Refuse shapes that would broadcast, and flags that are no booleans.

        Raises:
            ValueError: The tensors are not `(B,)` and `(M,)`, or `is_desirable_B` is not bool.
        """
        _one_shape(self, self.logp_B, "every tensor of the responses must be (B,)", skip=("kl_logp_M", "kl_ref_logp_M"))
        if self.kl_logp_M.ndim != 1 or self.kl_logp_M.shape != self.kl_ref_logp_M.shape:
            shapes = tuple(self.kl_logp_M.shape), tuple(self.kl_ref_logp_M.shape)
            raise ValueError(f"the mismatched pairs' tensors must be (M,), not {shapes[0]} and {shapes[1]}")
        if str(self.is_desirable_B.dtype) != "torch.bool":
            raise ValueError(f"is_desirable_B must be bool, not {self.is_desirable_B.dtype}")

    @property
    def nll_per_token_B(self) -> Tensor:
        """Mean NLL a token of each desirable response, 0 for the others.

        Raises:
            ValueError: The numbers of tokens were not given.
        """
        if self.tokens_B is None:
            raise ValueError("the SFT term needs tokens_B, the responses' numbers of tokens")
        return -(self.logp_B / self.tokens_B) * self.is_desirable_B


def _one_shape(
    logps: object, first: Tensor, rule: str, *, scalars: tuple[str, ...] = (), skip: tuple[str, ...] = ()
) -> None:
    given = {name: tuple(values.shape) for name, values in vars(logps).items() if values is not None}
    shapes = {name: shape for name, shape in given.items() if name not in (*scalars, *skip)}
    if len(set(shapes.values())) != 1 or first.ndim != 1:
        raise ValueError(f"{rule}, not {shapes}")
    for name in scalars:
        if given.get(name, ()) != ():
            raise ValueError(f"{name} must be a scalar, not {given[name]}")


class PreferenceLoss(Protocol):
    """A frozen class whose fields are the loss's parameters, with the method of its `form`.

    `pair`: `per_pair(PairLogps) -> (B,)`; `list`: `of_list(RankedLogps) -> scalar`;
    `unpaired`: `per_response(UnpairedLogps) -> (B,)`.
    """

    form: ClassVar[Form]
    """Which input, and so which method."""

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model takes part."""

    @property
    def needs_target_kl(self) -> bool:
        """Whether `chosen_kl_B` or `target_kl` must be given."""


class PairPreferenceLoss(PreferenceLoss, Protocol):
    """A loss on pairs."""

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair, `(B,)`; pairs do not mix."""


class ListPreferenceLoss(PreferenceLoss, Protocol):
    """A loss on the ranked responses of one prompt."""

    def of_list(self, ranked: RankedLogps) -> Tensor:
        """Return the loss of the list, a scalar; the order of the responses does not matter."""


class UnpairedPreferenceLoss(PreferenceLoss, Protocol):
    """A loss on single responses."""

    def per_response(self, unpaired: UnpairedLogps) -> Tensor:
        """Return the loss of each response, `(B,)`."""


class WithSft(Frozen):
    """The SFT term that every loss without one of its own can add."""

    needs_target_kl: ClassVar[bool] = False
    sft_coef: float = Field(0.0, ge=0)
    """Weight of the mean NLL a token of the chosen, best or desirable response, added to the loss."""


class PairLoss(WithSft, ABC):
    """Base of losses on pairs: `per_pair` is the formula plus the SFT term."""

    form: ClassVar[Form] = "pair"

    @abstractmethod
    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term, `(B,)`."""

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair, `(B,)`; pairs do not mix."""
        loss_B = self.formula(pairs)
        return loss_B + self.sft_coef * pairs.nll_per_token_B if self.sft_coef else loss_B


class ListLoss(WithSft, ABC):
    """Base of losses on lists: `of_list` is the formula plus the SFT term."""

    form: ClassVar[Form] = "list"

    @abstractmethod
    def formula(self, ranked: RankedLogps) -> Tensor:
        """Return the loss of the list without the SFT term, a scalar."""

    def of_list(self, ranked: RankedLogps) -> Tensor:
        """Return the loss of the list, a scalar; the order of the responses does not matter."""
        loss = self.formula(ranked)
        return loss + self.sft_coef * ranked.nll_per_token if self.sft_coef else loss


class UnpairedLoss(WithSft, ABC):
    """Base of losses on single responses: `per_response` is the formula plus the SFT term."""

    form: ClassVar[Form] = "unpaired"

    @abstractmethod
    def formula(self, unpaired: UnpairedLogps) -> Tensor:
        """Return the loss of each response without the SFT term, `(B,)`."""

    def per_response(self, unpaired: UnpairedLogps) -> Tensor:
        """Return the loss of each response, `(B,)`."""
        loss_B = self.formula(unpaired)
        return loss_B + self.sft_coef * unpaired.nll_per_token_B if self.sft_coef else loss_B
