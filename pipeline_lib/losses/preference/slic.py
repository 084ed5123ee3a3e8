"""SLiC: sequence likelihoods calibrated to a ranking, regularised to a target.

Legend: B pairs, K responses of a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline_lib.losses.preference.contract import Form
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps, RankedLogps


class Slic(Frozen):
    """Calibration + lam * regularisation; lp are sums over response tokens, s the rewards.

    rank: max(0, delta - lp_w + lp_l). margin: max(0, delta (s_w - s_l) - lp_w + lp_l). Both are
    means over the (better, worse) pairs of the list. list: sum over i better than j of
    max(0, delta |i - j| - lp_i + lp_j), i the number of strictly better responses.
    reward: -sum_i s_i softmax(lp)_i. Ties are not compared.

    The paper's s is the similarity of a response to the target; here it is the row's reward.
    The target is the best response. ce: -lp of the target. kl: sum over its tokens of
    KL(policy || reference), which has to be given.

    Source: Zhao et al. 2022 (arXiv 2210.00045); Zhao et al. 2023 (arXiv 2305.10425).
    """

    form: ClassVar[Form] = "list"
    kind: Literal["rank", "margin", "list", "reward"] = "rank"
    """The calibration term."""
    reg: Literal["ce", "kl", "none"] = "ce"
    """The regularisation: cross-entropy on the target, KL from the reference on it, or none."""
    delta: float = Field(1.0, gt=0)
    """Margin of log-probabilities; without effect on the kind reward."""
    lam: float = Field(0.5, ge=0)
    """lambda, the weight of the regularisation."""

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model takes part: for its KL alone."""
        return self.reg == "kl"

    @property
    def needs_target_kl(self) -> bool:
        """Whether the KL on the target must be given."""
        return self.reg == "kl"

    def of_list(self, ranked: RankedLogps) -> Tensor:
        """Return the loss of the list.

        Raises:
            ValueError: The KL is needed and missing.
        """
        calibration = self._calibration(ranked)
        return calibration + self.lam * self._regularization(ranked.best_logp, ranked.target_kl)

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of pairs without rewards, `(B,)`: of kind rank, or of kind list with K = 2.

        Raises:
            ValueError: The kind needs rewards, or the KL is needed and missing.
        """
        if self.kind not in ("rank", "list"):
            raise ValueError(f"SLiC of kind {self.kind} needs rewards, which pairs do not carry: use lists")
        hinge_B = (self.delta - pairs.chosen_B + pairs.rejected_B).clamp(min=0)
        return hinge_B + self.lam * self._regularization(pairs.chosen_B, pairs.chosen_kl_B)

    def _calibration(self, ranked: RankedLogps) -> Tensor:
        logp_K, is_pair_KK = ranked.logp_K, ranked.is_better_KK
        reward_K = ranked.reward_K.to(logp_K.dtype)
        if self.kind == "reward":
            return -(reward_K * logp_K.softmax(-1)).sum()
        lead_KK = logp_K[:, None] - logp_K[None, :]
        num_pairs = is_pair_KK.sum().clamp(min=1)
        if self.kind == "rank":
            return ((self.delta - lead_KK).clamp(min=0) * is_pair_KK).sum() / num_pairs
        if self.kind == "margin":
            gap_KK = reward_K[:, None] - reward_K[None, :]
            return ((self.delta * gap_KK - lead_KK).clamp(min=0) * is_pair_KK).sum() / num_pairs
        place_K = is_pair_KK.sum(0).to(logp_K.dtype)
        apart_KK = place_K[None, :] - place_K[:, None]
        return ((self.delta * apart_KK - lead_KK).clamp(min=0) * is_pair_KK).sum()

    def _regularization(self, target_logp: Tensor, target_kl: Tensor | None) -> Tensor:
        if self.reg == "kl":
            if target_kl is None:
                raise ValueError("SLiC with reg kl needs the KL on the target, which was not given")
            return target_kl
        return -target_logp if self.reg == "ce" else target_logp.detach() * 0
