"""The golden numbers notice when a sign, a mask, a reduction or an index is wrong.

Each mutant is one small change of a module's source; the changed source is compiled into a module of
its own, and the golden checks must fail on it.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType

import pytest

from tests.golden.check import check, load, topics
from tests.golden.check_gate import check_decision

MUTANTS = [
    # module, old, new
    ("losses.tokens", "- normalizer_C", "- 2 * normalizer_C"),
    ("losses.tokens", "torch.ones_like(logp_C)[:, None]", "torch.zeros_like(logp_C)[:, None]"),
    ("losses.tokens", "prob_CV.neg_()", "prob_CV"),
    ("losses.tokens", "self.labels_N[part, None]", "self.labels_N[: part.stop - part.start, None]"),
    ("losses.tokens", "-torch.linalg.vecdot(prob_CV, logp_CV)", "-logp_CV.mean(-1)"),
    ("losses.policy", "too_high = (advantages > 0)", "too_high = (advantages < 0)"),
    ("losses.policy", "too_low = (advantages < 0) &", "too_low = (advantages < 9) &"),
    ("losses.policy", "loss_sum=-(advantages * ratio).sum()", "loss_sum=(advantages * ratio).sum()"),
    ("losses.policy", "loss_sum=-(advantages * ratio).sum()", "loss_sum=-(advantages * ratio).mean()"),
    ("losses.policy", "advantages = torch.where(mask, advantages, zeros)", "pass"),
    ("losses.policy", "too_high, zeros + (1 + clip_range)", "too_high, zeros + (1 - clip_range)"),
    ("losses.policy", "policy_kl_sum=float(-detached", "policy_kl_sum=float(detached"),
    ("losses.policy", "0.5 * torch.maximum(plain, clipped)", "0.5 * torch.minimum(plain, clipped)"),
    ("losses.policy", "0.5 * torch.maximum(plain, clipped)", "torch.maximum(plain, clipped)"),
    ("losses.policy", "(values - returns).square(), (kept - returns)", "(values - returns).square(), (kept - values)"),
    ("losses.reward.pairs", "difference_P = better_P - worse_P", "difference_P = worse_P - better_P"),
    ("losses.reward.pairs", "difference_P = difference_P - margin_P", "difference_P = difference_P + margin_P"),
    ("losses.reward.pairs", "(better_P + worse_P).square()", "(better_P - worse_P).square()"),
    ("losses.reward.pairs", "(better_P > worse_P)", "(better_P >= worse_P)"),
    ("losses.preference.dpo", "self.beta * pairs.margin_B", "-self.beta * pairs.margin_B"),
    ("losses.preference.dpo", "(1 - self.label_smoothing) * logsigmoid", "logsigmoid"),
    ("losses.preference.dpo", "logsigmoid(-scaled_B)", "logsigmoid(scaled_B)"),
    ("losses.preference.dpo", "self.beta * pairs.margin_B", "pairs.margin_B"),
    ("losses.preference.robust", "+ flipped * logsigmoid", "- flipped * logsigmoid"),
    ("losses.preference.robust", "/ (1 - 2 * flipped)", "/ (1 - flipped)"),
    ("losses.preference.ipo", "1 / (2 * self.tau)", "1 / self.tau"),
    ("losses.preference.ipo", 'self.reduction == "sum"', 'self.reduction != "sum"'),
    ("losses.preference.r_dpo", "- self.alpha * longer_B", "+ self.alpha * longer_B"),
    ("losses.preference.r_dpo", ".to(pairs.chosen_B.dtype)", ".float()"),
    ("losses.preference.odpo", "- self._offset(pairs)", "+ self._offset(pairs)"),
    ("losses.preference.odpo", "clamp(min=0).log()", "clamp(min=0)"),
    ("losses.preference.exo", "- log(1 - e)", "- log(e)"),
    ("losses.preference.nca", "- 0.5 * (", "- 1.0 * ("),
    ("losses.preference.sppo", "pairs.rejected_ratio_B + target", "pairs.rejected_ratio_B - target"),
    ("losses.preference.apo_zero", "-self.beta * pairs.chosen", "self.beta * pairs.chosen"),
    ("losses.preference.apo_down", "-self.beta * pairs.margin_B", "self.beta * pairs.rejected_ratio_B"),
    ("losses.preference.simpo", "- self.gamma", "- self.beta * self.gamma"),
    ("losses.preference.simpo", "pairs.chosen_B / pairs.chosen_tokens_B", "pairs.chosen_B"),
    ("losses.preference.orpo", "- (-bounded_B.expm1()).log()", ""),
    ("losses.preference.orpo", "pairs.nll_per_token_B - ", "-pairs.chosen_B - "),
    ("losses.preference.cpo", "self.nll_coef * ", ""),
    ("losses.preference.kto", ".clamp(min=0)", ""),
    ("losses.preference.kto", "where(unpaired.is_desirable_B", "where(~unpaired.is_desirable_B"),
    ("losses.preference.kto", ".mean()", ".sum()"),
    ("losses.preference.plackett_luce", "~ranked.is_better_KK", "ranked.is_better_KK"),
    ("losses.preference.rrhf", "* ranked.is_better_KK", ""),
    ("losses.preference.rrhf", "ranked.mean_logp_K", "ranked.logp_K"),
    ("losses.preference.pro", "gap_KK.amax(1)", "gap_KK.amin(1)"),
    ("losses.preference.pro", "(len(mean_K) - 1) ** 2", "(len(mean_K) - 1)"),
    ("losses.preference.pro", "masked_fill(gap_KK <= 0", "masked_fill(gap_KK < 0"),
    ("losses.preference.slic", "self.delta * apart_KK", "self.delta * (apart_KK > 0)"),
    ("losses.preference.slic", "self.delta * gap_KK", "self.delta"),
    ("losses.preference.slic", "logp_K.softmax(-1)", "logp_K"),
    ("losses.reward.kwise", "responses * (responses - 1) // 2", "responses * (responses - 1)"),
    ("losses.reward.bradley_terry", "weight * len(loss_P)", "weight"),
    ("losses.reward.plackett_luce", "~is_better_KK, float", "is_better_KK, float"),
    ("losses.reward.best_of_k", "rank_K.min()", "rank_K.max()"),
    ("rl.advantage", "range(rewards_BT.shape[1] - 1, -1, -1)", "range(rewards_BT.shape[1] - 2, -1, -1)"),
    ("rl.advantage", "gamma * next_value_B - values", "gamma * next_value_B + values"),
    ("rl.advantage", "gamma * gae_lambda * next_advantage_B", "gae_lambda * next_advantage_B"),
    ("rl.advantage", "+ gamma * next_value_B", "+ next_value_B"),
    ("rl.advantage", "values_BT = torch.where(response_mask_BT, values_BT, zeros_BT)", "pass"),
    ("rl.advantage", "max(counted.numel() - 1, 1) if unbiased", "max(counted.numel() - 1, 1) if not unbiased"),
    ("rl.advantage", "if not shift_mean:", "if shift_mean:"),
    ("rl.advantage", "counted = values[mask]", "counted = values.flatten()"),
    ("rl.advantage", "return torch.where(mask, whitened, torch.zeros_like(whitened))", "return whitened"),
    ("rl.advantage", "torch.rsqrt(variance + epsilon)", "(variance + epsilon)"),
    ("rl.group_advantage", "/ (samples - 1)", "/ samples"),
    ("rl.group_advantage", "reward_GK.sum(1, keepdim=True) - reward_GK", "reward_GK.sum(1, keepdim=True)"),
    ("rl.group_advantage", "reward_GK.std(1, keepdim=True)", "reward_GK.std(1, keepdim=True, unbiased=False)"),
    ("rl.group_advantage", "(deviation_G1 + epsilon)", "deviation_G1"),
    ("rl.group_advantage", 'scale == "none"', 'scale != "none"'),
    ("rl.group_advantage", "reward_GK.mean(1, keepdim=True)", "reward_GK.mean()"),
    ("rl.group_advantage", ".all(1).float()", ".any(1).float()"),
    ("losses.group", "lengths_R.double() * num_responses", "lengths_R.double()"),
    ("losses.group", "1.0 / num_tokens", "1.0 / num_responses"),
    ("losses.group", "num_responses * constant", "constant"),
    ("losses.group", "policy.loss_sum + kl", "policy.loss_sum - kl"),
    ("losses.group", ".sum() * beta", ".sum()"),
    ("losses.group", "advantage_N * weight_N.to(advantage_N.dtype)", "advantage_N"),
    ("losses.group", "policy.loss_sum / num_responses", "policy.loss_sum"),
    ("rl.kl", "token_logp - ref_token_logp\n    if", "ref_token_logp - token_logp\n    if"),
    ("rl.kl", "difference.square() / 2", "difference.square()"),
    ("rl.kl", "torch.expm1(-difference) + difference", "torch.expm1(difference) - difference"),
    ("rl.kl", "(logp_TV.exp() * log_ratio_TV)", "(ref_logp_TV.exp() * log_ratio_TV)"),
    ("rl.kl", "error * num_steps / self.horizon", "error / self.horizon"),
    ("rl.kl", "kl_nats / self.target - 1, -MAX", "1 - kl_nats / self.target, -MAX"),
    ("rl.rewards", "-kl_coef * kl_BT", "kl_coef * kl_BT"),
    ("rl.rewards", "last_B1 = (places_T * response_mask_BT)", "last_B1 = (places_T + 0 * response_mask_BT)"),
    ("rl.rewards", "torch.where(is_finished_B, score_B, changed_B)", "torch.where(is_finished_B, changed_B, score_B)"),
    ("rl.rewards", "torch.where(response_mask_BT, -kl_coef", "torch.where(response_mask_BT | True, -kl_coef"),
    ("evaluation.text_metrics", "common / len(theirs)", "common / len(mine)"),
    ("evaluation.text_metrics", "diagonal = above", "diagonal = row[place]"),
    ("evaluation.text_metrics", "range(len(tokens) - n + 1)", "range(len(tokens) - n)"),
    ("evaluation.stats", "columns[0] > columns[1]", "columns[0] >= columns[1]"),
    ("evaluation.stats", "+ 0.5 * (columns[0] == columns[1])", ""),
    (
        "evaluation.stats",
        "np.exp(columns[0].sum(-1) / columns[1].sum(-1))",
        "np.exp((columns[0] / columns[1]).sum(-1))",
    ),
    ("evaluation.stats", "(columns[0] - columns[1]).mean", "(columns[1] - columns[0]).mean"),
    ("evaluation.gate_metrics.reward_model_accuracy", "(1 + confidence) / 2", "confidence"),
    ("evaluation.gate_metrics.reward_model_accuracy", "(z / (2 * pairs)) ** 2", "z / (2 * pairs)"),
]
GATE_MUTANTS = [
    ("/ max(1, len(candidates))", "/ 1"),
    ('all(result.status != "fail"', 'any(result.status != "fail"'),
    (' and any(r.status == "pass" for r in rules)', ""),
    ("winner = max(passed", "winner = min(passed"),
    ("compared >= rule.threshold if", "compared > rule.threshold if"),
    ("compared <= rule.threshold", "compared < rule.threshold"),
    ("estimate.num_examples < policy.min_examples", "estimate.num_examples <= policy.min_examples"),
    ("metric.against == CHAMPION and champion is None", "champion is None"),
    ("metric.against == CHAMPION and champion == model", "False"),
    (
        'return result(estimate, "fail", "the figure is missing',
        'return result(estimate, "pass", "the figure is missing',
    ),
    ('return result(empty, "fail", f"there are no', 'return result(empty, "not_applicable", f"there are no'),
    ("verdict.is_passed and verdict.rank_value", "verdict.rank_value"),
    (" and verdict.rank_value is not None", ""),
]


HEAD_MUTANTS = [
    ("logits_CV += self.bias_V", "pass"),
    ("logits_CV /= self.temperature", "logits_CV *= self.temperature"),
    ("prob_CV.amax(-1).log()", "prob_CV.amax(-1)"),
    ("logits_CV.amax(-1) -", "logits_CV.amax(-1) +"),
    ("@ head.weight_VD) / head.temperature", "@ head.weight_VD)"),
    ("grad_CV *= grad_N[part, None]", "pass"),
    ("alpha=1 / head.temperature", "alpha=1"),
    ("(grad_CV.sum(0) / head.temperature)", "grad_CV.sum(0)"),
    ("grad_ND * grad_N.to(grad_ND.dtype)[:, None]", "grad_ND"),
    ("range(0, num_tokens, self.chunk_tokens)", "range(0, num_tokens, num_tokens)"),
    ("hidden_ND[part].to(narrow_CV.dtype), alpha", "hidden_ND[: len(narrow_CV)].to(narrow_CV.dtype), alpha"),
    ("logits_CV.div_(self.softcap).tanh_()", "logits_CV.tanh_()"),
    ("logits_CV *= self.softcap", "pass"),
    (".neg_().add_(1.0)", ".neg_()"),
    ("head.narrow(head.below_cap(found.grad_CV))", "head.narrow(found.grad_CV)"),
    (
        "head.below_cap(ctx.measure(head, hidden_ND[part], part, with_gradient=True).grad_CV)",
        "ctx.measure(head, hidden_ND[part], part, with_gradient=True).grad_CV",
    ),
]


def mutant(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> ModuleType:
    """Compile a module's source with one change into a module of its own."""
    source = inspect.getsource(importlib.import_module(name))
    assert old in source, f"{name} no longer has {old!r}: write the mutant anew"
    module = ModuleType(f"mutant_of_{name.replace('.', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses and pydantic look there
    exec(compile(source.replace(old, new), module.__name__, "exec"), module.__dict__)
    return module


def survives(name: str, module: ModuleType) -> bool:
    """Tell whether a module passes every golden check of the module that it stands for."""
    try:
        for golden in (load(topic) for topic in topics()):
            for case in golden.cases:
                if case.get("module", golden.module) == name:
                    check(name, case, module)
    except AssertionError:
        return False
    return True


def decides_as_the_gate(module: ModuleType) -> bool:
    """Tell whether a module passes every golden case of the gate."""
    try:
        for case in load("gate_by_hand").cases:
            check_decision(case, module)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", sorted({f"pipeline_lib.{module}" for module, _, _ in MUTANTS}))
def test_the_unchanged_source_survives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert survives(name, mutant(monkeypatch, name, "", ""))


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS)
def test_mutant_is_killed(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant(monkeypatch, f"pipeline_lib.{name}", old, new)
    assert not survives(f"pipeline_lib.{name}", module)


def test_the_unchanged_gate_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decides_as_the_gate(mutant(monkeypatch, "pipeline_lib.evaluation.gate", "", ""))


@pytest.mark.parametrize(("old", "new"), GATE_MUTANTS)
def test_mutant_of_the_gate_is_killed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not decides_as_the_gate(mutant(monkeypatch, "pipeline_lib.evaluation.gate", old, new))


@pytest.mark.parametrize(("old", "new"), HEAD_MUTANTS)
def test_mutant_of_the_chunked_head_is_killed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant(monkeypatch, "pipeline_lib.losses.chunked_head", old, new)
    tokens = importlib.import_module("pipeline_lib.losses.tokens")
    for name in ("per_token", "ChunkedHead", "ChunkValues"):
        monkeypatch.setattr(tokens, name, getattr(module, name))
    assert not survives("pipeline_lib.losses.tokens", tokens)
