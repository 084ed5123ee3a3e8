"""What `ppo_learns` found, as a section of docs/performance.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.learns_language_report import language_part
from benchmarks.learns_plots import LABELS
from benchmarks.page import write_between

_HEADING = "## Does it learn?\n\n`python -m benchmarks.ppo_learns all`."
Found = dict[str, Any]


def write_section(results: Path, page: Path) -> str:
    """Write the results of a folder between the page's markers; append the section where there is none.

    Returns:
        The generated part.
    """
    parts = []
    for name, part in _PARTS.items():
        if (results / f"{name}.json").exists():
            drawn = results / f"{name}.svg"
            plot = f"![{name}]({os.path.relpath(drawn, page.parent)})" if drawn.exists() else "(Not drawn.)"
            parts.append(part(json.loads((results / f"{name}.json").read_bytes()), plot))
    generated = "\n\n".join(parts)
    write_between(page, "learns", generated, heading=_HEADING)
    return generated


def _learn_part(found: Found, plot: str) -> str:
    goal = found["goal_frac"] * found["best_score"]
    reached = sum(run["is_reached"] for run in found["runs"])
    lines = [
        "**A rule.** A model of 340 000 weights that speaks a toy language; the score is the mean of three rules "
        "(share of three given words, twelve words, ends by itself with a full stop), the best possible "
        f"{found['best_score']:.0f}. Before: {found['start']['score']:.2f}. Each run has {found['iterations']} "
        f"iterations of 64 responses. Goal: {goal:.2f} at no more than {found['kl_limit_nats']:.0f} nats from the "
        f"start, measured on fresh samples: {reached} of {len(found['runs'])} runs reach it; "
        f"{_time(found)}",
        "",
        plot,
        "",
        "| method | seed | score | words | length | full stop | KL (nats) | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        parts = run["parts"]
        lines.append(
            f"| {LABELS[run['method']]} | {run['seed']} | {_score(run)} | "
            f"{parts['words']:.2f} | {parts['length']:.2f} | {parts['full_stop']:.2f} | "
            f"{_kl(run)} | {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _frontier_part(found: Found, plot: str) -> str:
    lines = [
        f"**Every method.** Score against KL after {found['responses']} generated responses, from strong to weak pull "
        "towards the start (one seed; intervals are over samples). Best-of-n costs n responses for each answer, "
        f"and its KL is the formula's, log n − (n − 1)/n. {_best_possible(found)}{_time(found)}",
        "",
        plot,
        "",
        "| method | strength | score | KL (nats) | tokens a response |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {LABELS[run['method']]} | {run['strength']:g} | {_score(run)} | {_kl(run)} | {run['response_tokens']:.1f} |"
        for run in found["runs"]
    ]
    lines += [
        f"| best of {row['n']} | | {row['score']:.3f} | {row['kl_nats']:.2f} | |"
        for row in found["best_of_n"]
        if row["n"] > 1
    ]
    return "\n".join(lines)


def _controlled_part(found: Found, plot: str) -> str:
    of_pairs, learnt = "", ""
    if "pairs" in found:
        of_pairs = f"{found['pairs']} pairs of "
        learnt = (
            f", or on a reward model of the pairs (it orders {found['test_accuracy_frac']:.0%} of fresh ones as the "
            "rule does)"
        )
    lines = [
        f"**DPO and PPO where the truth is known.** The rule labels {of_pairs}{found['responses']} samples of the "
        f"start, two by two, and DPO trains on them; PPO trains on the rule itself{learnt} and generates "
        f"{found['responses']} responses of its own. Score is the rule's, on fresh samples. "
        f"{_best_possible(found)}{_time(found)}",
        "",
        plot,
        "",
        "| method | β or KL weight | true score | KL (nats) | tokens a response |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {LABELS[run['method']]} | {run['strength']:g} | {_score(run)} | {_kl(run)} | {run['response_tokens']:.1f} |"
        for run in found["runs"]
    ]
    return "\n".join(lines)


_PARTS: dict[str, Callable[[Found, str], str]] = {
    "learn": _learn_part, "language": language_part, "language_hh": language_part, "frontier": _frontier_part,
    "controlled": _controlled_part,
}  # fmt: skip


def _score(run: Found) -> str:
    return f"{run['score']:.3f} ± {1.96 * run['score_error']:.3f}"


def _kl(run: Found) -> str:
    return f"{run['kl_nats']:.2f} ± {1.96 * run['kl_error']:.2f}"


def _best_possible(found: Found) -> str:
    if not found["best_possible"]:
        return ""
    return (
        "Faint lines: the way there. The black line is π_ref exp(score/t)/Z for falling t, above which no policy can "
        "be; its sums are estimated by importance weights on samples of the start and of the PPO runs. "
    )


def _time(found: Found) -> str:
    if "seconds" not in found:
        return "The run was cut before its end: what had finished is shown."
    return f"{found['seconds'] / 60:.0f} minutes, {found['cpu_seconds'] / 60:.1f} of them on the one core it uses."
