"""ORPO: cross-entropy and a penalty on the odds ratio, no reference. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import Form
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Orpo(Frozen):
    """NLL - lambda log sigma(log odds_w - log odds_l), odds = P / (1 - P), P = exp(mean log-prob a token).

    NLL is the mean a token of the chosen text as given, else of the response; P is the response's.

    Source: Hong et al. 2024 (arXiv 2403.07691), eq. 4, 6 and 7.
    """

    form: ClassVar[Form] = "pair"
    needs_reference: ClassVar[bool] = False
    needs_target_kl: ClassVar[bool] = False
    lam: float = Field(0.1, ge=0)
    """lambda, the weight of the penalty."""

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        chosen_B = _log_odds(pairs.chosen_B / pairs.chosen_tokens_B)
        rejected_B = _log_odds(pairs.rejected_B / pairs.rejected_tokens_B)
        return pairs.nll_per_token_B - self.lam * logsigmoid(chosen_B - rejected_B)


def _log_odds(mean_logp_B: Tensor) -> Tensor:
    """Return log(P / (1 - P)), without gradient where P is 1 but for rounding."""
    from torch import finfo  # noqa: PLC0415  (configuration needs no torch)

    bounded_B = mean_logp_B.clamp(max=-finfo(mean_logp_B.dtype).eps)
    return bounded_B - (-bounded_B.expm1()).log()
