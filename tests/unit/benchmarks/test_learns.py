"""The arithmetic of the benchmark of learning: the best possible frontier, the toy rule, pairs, pages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.learns_controlled import ordered
from benchmarks.learns_optimum import tilted
from benchmarks.learns_plots import DRAWN
from benchmarks.learns_report import write_section
from benchmarks.learns_task import Rule, chat_tokenizer, rows
from benchmarks.page import marker
from pipeline_lib.training.sampling_rollouts import group_tree

BEGIN, END = marker("learns", "begin"), marker("learns", "end")

START = (0.7, 0.2, 0.1)
"""Probabilities of three answers under the start, and, of the same, under a trained policy."""
TRAINED = (0.1, 0.3, 0.6)
SCORES = (0.0, 0.5, 1.0)


def drawn(*models: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten samples from each model, each answer exactly as often as it is likely."""
    answers = [k for model in models for k in range(3) for _ in range(round(10 * model[k]))]
    logp = [[math.log(model[k]) for k in answers] for model in models]
    score = torch.tensor([[SCORES[k] for k in answers]], dtype=torch.float64)
    return score, torch.tensor(logp, dtype=torch.float64)[:, None]


def by_hand(temperature: float) -> tuple[float, float]:
    tilt = [p * math.exp(r / temperature) for p, r in zip(START, SCORES, strict=True)]
    best = [one / sum(tilt) for one in tilt]
    score = sum(p * r for p, r in zip(best, SCORES, strict=True))
    return score, sum(p * math.log(p / q) for p, q in zip(best, START, strict=True))


@pytest.mark.parametrize("models", [(START,), (START, TRAINED)])
@pytest.mark.parametrize("temperature", [5.0, 0.5, 0.1])
def test_the_best_possible_frontier_is_that_of_the_tilted_start(
    models: tuple[tuple[float, ...], ...], temperature: float
) -> None:
    found = tilted(*drawn(*models), temperature=temperature)
    score, kl = by_hand(temperature)
    assert found["score"] == pytest.approx(score, rel=1e-12)
    assert found["kl_nats"] == pytest.approx(kl, rel=1e-9)


def test_no_policy_is_above_the_frontier() -> None:
    score = sum(p * r for p, r in zip(TRAINED, SCORES, strict=True))
    kl = sum(p * math.log(p / q) for p, q in zip(TRAINED, START, strict=True))
    at_that_kl = min(
        (tilted(*drawn(START, TRAINED), temperature=0.001 * k) for k in range(100, 2000)),
        key=lambda row: abs(row["kl_nats"] - kl),
    )
    assert at_that_kl["score"] > score


def scored(text: str, *, is_finished: bool = True) -> tuple[float, dict[str, float]]:
    chat = chat_tokenizer()
    ids = [*chat.ids(text), *([chat.eos_id] if is_finished else [])]
    score_R, parts = Rule(chat).of([group_tree(0, chat.ids("<user> tell"), [ids])], [is_finished])
    return float(score_R[0]), parts


def test_the_rule_gives_its_best_score_to_what_it_wants_and_thirds_to_parts() -> None:
    best = "the silver river sings and the old star falls near the lamp ."
    assert scored(best)[0] == 1.0
    assert scored("the silver river sings .")[1] == {
        "words": 1.0, "length": pytest.approx(1 - (12 - 5 - 1) / 12), "full_stop": 1.0
    }  # fmt: skip
    assert scored(best, is_finished=False)[1]["full_stop"] == 0.0
    assert scored("the old silver bird sleeps")[1] == {
        "words": pytest.approx(1 / 3), "length": pytest.approx(1 - 6 / 12), "full_stop": 0.0
    }  # fmt: skip


def test_demonstrations_never_reach_the_best_score_by_rote() -> None:
    scores = [scored(row.responses[0].content)[0] for row in rows(300, seed=0)]
    assert max(scores) <= 1.0
    assert sum(scores) / len(scores) < 0.7


def test_pairs_have_the_better_response_first_and_no_ties() -> None:
    trees = [group_tree(9, (1,), [(2,), (3,)]), group_tree(9, (1,), [(4,), (5,)]), group_tree(9, (1,), [(6,), (7,)])]
    found = ordered(trees, torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.8, 0.2]]))
    assert [tree.response_ids for tree in found] == [((3,), (2,)), ((6,), (7,))]
    assert [tree.record_id for tree in found] == ["0", "1"]


def run(method: str, **changed: Any) -> dict[str, Any]:
    curve = [{"responses": 0, "score": 0.5, "kl_nats": 0.0}, {"responses": 64, "score": 0.9, "kl_nats": 3.0}]
    return {
        "method": method, "strength": 0.1, "seed": 0, "seconds": 1.0, "is_reached": True, "curve": curve, "tokens": 640,
        "score": 0.9, "score_error": 0.01, "kl_nats": 3.0, "kl_error": 0.1, "response_tokens": 11.0,
        "parts": {"words": 0.9, "length": 1.0, "full_stop": 0.8}, **changed,
    }  # fmt: skip


def language_found(kind: str) -> dict[str, Any]:
    def span(value: float, half: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half}

    pieces = ("base", "start", "answers", "proxy", "heldout", "measure_before", "ppo", "measure_after")
    row = {"iteration": 0.0, "score": 0.1, "heldout_score": 0.0, "ref_kl_nats": 0.0}
    both = {"before": span(0.0, 0.1), "after": span(1.0, 0.1), "gain": span(1.0, 0.05)}
    return {
        "kind": kind, "sizes": {"sft": 12, "reward": 6, "test": 8, "policy": 9}, "agreement": 0.5, "threads": 2,
        "training": {"kl_coef": 0.05, "iterations": 3, "rollouts": 8}, "kl_limit_nats": 10.0, "kl_nats": span(2.0, 0.3),
        "test_accuracy_frac": {"proxy": 0.9, "heldout": 0.8}, "curve": [row], "proxy": both, "heldout": both,
        "verdicts": {"is_up_apart": True, "is_near": True, "is_heldout_not_down": False},
        "spent": {name: {"seconds": 60.0, "cpu_seconds": 120.0} for name in pieces},
        "tokens_before": 9.0, "tokens_after": 8.0, "finished_frac_before": 0.5, "finished_frac_after": 1.0,
        "entropy_nats_before": 2.0, "entropy_nats_after": 1.0,
        "samples": [{"prompt": "What does `a|b` do?", "before": "Return <x>.", "after": "Return\ny."}],
    }  # fmt: skip


def test_every_part_is_drawn_and_told_on_the_page(tmp_path: Path) -> None:
    best = [{"temperature": 1.0, "score": 0.6, "kl_nats": 0.5}, {"temperature": 0.1, "score": 0.95, "kl_nats": 3.0}]
    spent = {"seconds": 120.0, "cpu_seconds": 60.0}
    language = language_found(kind="documentation")
    found: dict[str, dict[str, Any]] = {
        "learn": {"goal_frac": 0.9, "best_score": 1.0, "kl_limit_nats": 15.0, "iterations": 1, "start": {"score": 0.5},
                  "runs": [run("ppo"), run("grpo", is_reached=False)], **spent},
        "frontier": {"responses": 64, "runs": [run("raft")], "best_possible": best, **spent,
                     "best_of_n": [{"n": n, "score": 0.6, "kl_nats": math.log(n) - (n - 1) / n} for n in (1, 2)]},
        "controlled": {"responses": 64, "pairs": 30, "test_accuracy_frac": 0.9, "runs": [run("dpo"), run("ppo_true")],
                       "best_possible": best, **spent},
        "language": language, "language_hh": {**language, "kind": "hh"},
    }  # fmt: skip
    assert found.keys() == DRAWN.keys()
    DRAWN["controlled"]({"runs": [run("dpo", curve=[])], "best_possible": []}, tmp_path / "cut.svg")
    for name, content in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        DRAWN[name](content, tmp_path / f"{name}.svg")
        assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    write_section(tmp_path, page)
    text = page.read_text()
    assert text.startswith("# Page\n")
    assert text.endswith("\n\nafter\n")
    assert "\nold\n" not in text
    assert "1 of 2 runs reach it" in text
    assert "| PPO | 0 | 0.900 ± 0.020 | 0.90 | 1.00 | 0.80 | 3.00 ± 0.20 | 1 |" in text
    assert text.count("2 minutes, 1.0 of them on the one core") == 3
    assert "| best of 2 | | 0.600 | 0.19 | |" in text
    assert [f"![{name}]({name}.svg)" in text for name in DRAWN] == [True] * 5
    assert "| proxy | 0.00 (-0.10 to 0.10) | 1.00 (0.90 to 1.10) | 1.00 (0.95 to 1.05) |" in text
    assert "- held-out reward not down: **no**" in text
    assert "8.0 minutes on 2 threads, 16.0 of one core: start and reward models 5.0, PPO 1.0, measuring 2.0." in text
    assert "| What does `a\\|b` do? | Return &lt;x>. | Return y. |" in text
    assert "people's choices" in text
