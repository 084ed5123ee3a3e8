"""What `ppo_learns` found, as plots: one SVG a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LABELS = {
    "ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "raft": "RAFT", "iterated_dpo": "iterated DPO", "dpo": "DPO",
    "ppo_true": "PPO on the true reward", "ppo_learnt": "PPO on a reward model of the pairs",
}  # fmt: skip
COLOURS = {
    "ppo": "#3465a4", "rloo": "#c4500b", "grpo": "#2e7d32", "raft": "#8e24aa", "iterated_dpo": "#b8860b",
    "dpo": "#b8860b", "ppo_true": "#3465a4", "ppo_learnt": "#c4500b",
}  # fmt: skip
KL_LABEL = "KL from the start, nats a response"


def draw_learn(found: dict[str, Any], path: Path) -> None:
    """Draw score and KL of every run over the responses that it has generated."""
    figure, (scores, kls) = _figure(columns=2)
    for run in found["runs"]:
        x = [row["responses"] for row in run["curve"]]
        for axes, name in ((scores, "score"), (kls, "kl_nats")):
            axes.plot(
                x, [row[name] for row in run["curve"]], color=COLOURS[run["method"]], linewidth=1.1, alpha=0.8,
                label=LABELS[run["method"]] if run["seed"] == found["runs"][0]["seed"] else None,
            )  # fmt: skip
    scores.axhline(found["goal_frac"] * found["best_score"], color="#777777", linestyle=":", label="goal")
    kls.axhline(found["kl_limit_nats"], color="#777777", linestyle=":")
    scores.set_ylabel("score of the iteration's samples")
    kls.set_ylabel(KL_LABEL)
    for axes in (scores, kls):
        axes.set_xlabel("responses generated")
    scores.legend(loc="lower right", frameon=False)
    _save(figure, path)


def draw_frontier(found: dict[str, Any], path: Path) -> None:
    """Draw the measured end of each run, joined by method, its way there, best-of-n and the best possible."""
    figure, (axes,) = _figure(columns=1)
    _draw_best(axes, found["best_possible"], found["runs"])
    best = found["best_of_n"]
    axes.plot(
        [row["kl_nats"] for row in best], [row["score"] for row in best], "--", color="#777777", marker=".",
        label="best of n, n = 1 … " + str(best[-1]["n"]),
    )  # fmt: skip
    _draw_runs(axes, found["runs"])
    _name_frontier(axes)
    _save(figure, path)


def draw_controlled(found: dict[str, Any], path: Path) -> None:
    """Draw true score against KL of DPO and PPO, each run's end and its way there, and the best possible."""
    figure, (axes,) = _figure(columns=1)
    _draw_best(axes, found["best_possible"], found["runs"])
    _draw_runs(axes, found["runs"])
    _name_frontier(axes)
    _save(figure, path)


def draw_language(found: dict[str, Any], path: Path) -> None:
    """Draw both reward models' scores over the iterations' rollouts and against their KL, and the held-out prompts."""
    figure, (over_time, over_kl) = _figure(columns=2)
    rows, end = found["curve"], found["kl_nats"]
    for name, label, colour in (("score", "proxy", "#3465a4"), ("heldout_score", "held out", "#c4500b")):
        values = [row[name] for row in rows]
        over_time.plot([row["iteration"] + 1 for row in rows], values, color=colour, marker=".", label=label)
        over_kl.plot([row["ref_kl_nats"] for row in rows], values, ".", color=colour, alpha=0.35)
        before, after = (found["proxy" if name == "score" else "heldout"][when] for when in ("before", "after"))
        both = [before["value"], after["value"]]
        over_kl.errorbar(
            [0.0, end["value"]], both, color=colour, marker="o", capsize=3, label=f"{label}, held-out prompts",
            xerr=[[0.0, end["value"] - end["low"]], [0.0, end["high"] - end["value"]]],
            yerr=[[one["value"] - one["low"] for one in (before, after)],
                  [one["high"] - one["value"] for one in (before, after)]],
        )  # fmt: skip
    over_time.set_xlabel("iteration")
    over_kl.set_xlabel(KL_LABEL)
    for axes in (over_time, over_kl):
        axes.set_ylabel("score, deviations of the start's")
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


DRAWN: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "learn": draw_learn, "frontier": draw_frontier, "controlled": draw_controlled, "language": draw_language,
    "language_hh": draw_language,
}  # fmt: skip
"""By part, which is the name of its JSON and its SVG too."""


def _draw_best(axes: Axes, best: Sequence[dict[str, float]], runs: Sequence[dict[str, Any]]) -> None:
    if not best:
        return  # a run that was cut has none
    furthest = 1.05 * max(run["kl_nats"] for run in runs)
    shown = [row for row in best if row["kl_nats"] <= furthest]
    axes.plot(
        [row["kl_nats"] for row in shown], [row["score"] for row in shown], color="black", linewidth=1,
        label="best possible (importance weights)",
    )  # fmt: skip


def _draw_runs(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    for method in dict.fromkeys(run["method"] for run in runs):
        own = sorted((run for run in runs if run["method"] == method), key=lambda run: float(run["kl_nats"]))
        for run in own:
            axes.plot(
                [row["kl_nats"] for row in run["curve"]], [row["score"] for row in run["curve"]],
                color=COLOURS[method], alpha=0.18, linewidth=1,
            )  # fmt: skip
        axes.errorbar(
            [run["kl_nats"] for run in own], [run["score"] for run in own],
            xerr=[1.96 * run["kl_error"] for run in own], yerr=[1.96 * run["score_error"] for run in own],
            color=COLOURS[method], marker="o", markersize=4, linewidth=1.4, capsize=2, label=LABELS[method],
        )  # fmt: skip


def _name_frontier(axes: Axes) -> None:
    axes.set_xlabel(KL_LABEL)
    axes.set_ylabel("true score (best possible: 1)")
    axes.set_xlim(left=-0.3)
    axes.legend(loc="lower right", frameon=False)


def _figure(*, columns: int) -> tuple[Figure, list[Axes]]:
    # Text stays text, and ids do not change from run to run.
    pyplot.rcParams.update({"svg.hashsalt": "prefline", "svg.fonttype": "none", "font.size": 9})
    width = {1: 7.5, 2: 9.0}[columns]
    figure, axes = pyplot.subplots(1, columns, figsize=(width, 4.8 if columns == 1 else 3.4), squeeze=False)
    for one in axes[0]:
        one.grid(visible=True, alpha=0.25)
    return figure, list(axes[0])


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
