"""What `ppo_learns` found, as a plot of score against KL and as a section of docs/performance.md."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

BEGIN, END = "<!-- learns:begin -->", "<!-- learns:end -->"
LABELS = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "raft": "RAFT", "iterated_dpo": "iterated DPO"}
COLOURS = {"ppo": "#3465a4", "rloo": "#c4500b", "grpo": "#2e7d32", "raft": "#8e24aa", "iterated_dpo": "#b8860b"}


def draw_frontier(found: dict[str, Any], path: Path) -> None:
    """Draw the measured end of each run, joined by method, the way of each there, and best-of-n."""
    pyplot.rcParams["svg.hashsalt"] = "prefline"
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8))
    best = found["best_of_n"]
    axes.plot(
        [row["kl_nats"] for row in best], [row["score"] for row in best], "--", color="#777777", marker=".",
        label="best of n, n = 1 … " + str(best[-1]["n"]),
    )  # fmt: skip
    for method, label in LABELS.items():
        runs = sorted((run for run in found["runs"] if run["method"] == method), key=lambda run: run["kl_nats"])
        for run in runs:
            axes.plot(
                [row["kl_nats"] for row in run["curve"]], [row["score"] for row in run["curve"]],
                color=COLOURS[method], alpha=0.18, linewidth=1,
            )  # fmt: skip
        axes.errorbar(
            [run["kl_nats"] for run in runs], [run["score"] for run in runs],
            xerr=[1.96 * run["kl_error"] for run in runs], yerr=[1.96 * run["score_error"] for run in runs],
            color=COLOURS[method], marker="o", markersize=4, linewidth=1.4, capsize=2, label=label,
        )  # fmt: skip
    axes.set_xlabel("KL from the start, nats a response")
    axes.set_ylabel("score (best possible: 1)")
    axes.set_xlim(left=-0.3)
    axes.grid(visible=True, alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(f"Score against KL after {found['responses']} generated responses", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write_section(results: Path, page: Path) -> str:
    """Write the results of a folder between the page's markers; append the section where there is none.

    Returns:
        The generated part.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Does it learn?\n\n`python -m benchmarks.ppo_learns all`.\n\n{BEGIN}\n{END}\n"
    parts = []
    if (results / "learn.json").exists():
        parts.append(_learn_part(json.loads((results / "learn.json").read_bytes())))
    if (results / "frontier.json").exists():
        place = os.path.relpath(results / "frontier.svg", page.parent)
        parts.append(_frontier_part(json.loads((results / "frontier.json").read_bytes()), place))
    generated = "\n\n".join(parts)
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{generated}\n{END}{after}", encoding="utf-8")
    return generated


def _learn_part(found: dict[str, Any]) -> str:
    goal = found["goal_frac"] * found["best_score"]
    reached = sum(run["is_reached"] for run in found["runs"])
    lines = [
        "A model of 340 000 weights that speaks a toy language; the score is the mean of three rules (share of "
        "three given words, twelve words, ends by itself with a full stop), the best possible "
        f"{found['best_score']:.0f}. Before: {found['start']['score']:.2f}. Each run has {found['iterations']} "
        f"iterations of 64 responses. Goal: {goal:.2f} at no more than {found['kl_limit_nats']:.0f} nats from the "
        f"start, measured on fresh samples: {reached} of {len(found['runs'])} runs reach it; "
        f"{found['seconds'] / 60:.1f} minutes in all.",
        "",
        "| method | seed | score | words | length | full stop | KL (nats) | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        parts = run["parts"]
        lines.append(
            f"| {LABELS[run['method']]} | {run['seed']} | {run['score']:.3f} ± {1.96 * run['score_error']:.3f} | "
            f"{parts['words']:.2f} | {parts['length']:.2f} | {parts['full_stop']:.2f} | "
            f"{run['kl_nats']:.1f} ± {1.96 * run['kl_error']:.1f} | {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _frontier_part(found: dict[str, Any], place: str) -> str:
    lines = [
        f"Score against KL, every method after {found['responses']} generated responses, from strong to weak pull "
        "towards the start (one seed; intervals are over samples). Faint lines: the way there. Best-of-n costs n "
        "responses for each answer, and its KL is the formula's, log n − (n − 1)/n.",
        "",
        f"![score against KL]({place})",
        "",
        "| method | strength | score | KL (nats) | tokens a response |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {LABELS[run['method']]} | {run['strength']:g} | {run['score']:.3f} ± {1.96 * run['score_error']:.3f} | "
        f"{run['kl_nats']:.2f} ± {1.96 * run['kl_error']:.2f} | {run['response_tokens']:.1f} |"
        for run in found["runs"]
    ]
    lines += [
        f"| best of {row['n']} | | {row['score']:.3f} | {row['kl_nats']:.2f} | |"
        for row in found["best_of_n"]
        if row["n"] > 1
    ]
    return "\n".join(lines)
