"""Does it learn? PPO, RLOO and GRPO on a rule whose best score is known, and every method's score against its KL.

`python -m benchmarks.ppo_learns learn` trains three methods from three seeds each and fails where one
of them stays below 90 % of the best score or goes further than the KL limit. `frontier` trains every
method at several strengths of its KL term, at equal generated responses, and draws score against KL.
Both write JSON, and the part of docs/performance.md between its markers. No network, minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.learns_methods import METHODS, RESPONSES_PER_ITERATION, SAMPLES_MEASURED, best_of_n, run
from benchmarks.learns_report import draw_frontier, write_section
from benchmarks.learns_task import BEST_SCORE, make_task, measure
from pipeline_lib.training.settings import OfflineSettings

SEEDS = (0, 1, 2)
ITERATIONS = 40
STRENGTHS = {"ppo": 0.01, "rloo": 0.01, "grpo": 0.1}
"""KL weights of the runs that must learn."""
GOAL_FRAC = 0.9
KL_LIMIT_NATS = 15.0
LIMIT_S = 600.0
FRONTIER_ITERATIONS = 25
FRONTIER: dict[str, tuple[float, ...]] = {
    "ppo": (0.2, 0.05, 0.01),
    "rloo": (0.2, 0.05, 0.01),
    "grpo": (0.5, 0.1, 0.02),
    "raft": (2, 4, 8),
    "iterated_dpo": (1.0, 0.3, 0.1),
}
"""From strong to weak: KL weight, beta, samples to choose from, DPO's beta."""


def main() -> None:
    """Run what is asked for; exit with 1 where a method did not learn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("learn", "frontier", "all", "page"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/learns"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.results.mkdir(parents=True, exist_ok=True)
    has_learnt = True
    if chosen.part in ("learn", "all"):
        found = learn()
        has_learnt = found["has_learnt"]
        _write(chosen.results / "learn.json", found)
    if chosen.part in ("frontier", "all"):
        _write(chosen.results / "frontier.json", frontier())
    drawn = chosen.results / "frontier.json"
    if drawn.exists():
        draw_frontier(json.loads(drawn.read_bytes()), chosen.results / "frontier.svg")
    write_section(chosen.results, chosen.page)
    sys.exit(0 if has_learnt else 1)


def learn() -> dict[str, Any]:
    """Train each method from each seed; return what fresh samples show."""
    started = time.monotonic()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), seed=0)
        start = measure(task, task.policy(OfflineSettings(adapter=None)), samples=SAMPLES_MEASURED, seed=0)
        for seed in SEEDS:
            for name, strength in STRENGTHS.items():
                began = time.monotonic()
                shown, curve = run(name, task, Path(folder), strength=strength, iterations=ITERATIONS, seed=seed)
                spent = time.monotonic() - began
                is_reached = shown.score >= GOAL_FRAC * BEST_SCORE and shown.kl_nats <= KL_LIMIT_NATS
                print(f"{name}, seed {seed}: {shown}, {spent:.0f} s, {'reached' if is_reached else 'missed'}")
                about = {"method": name, "seed": seed, "strength": strength, "seconds": spent, "curve": curve}
                runs.append({**about, "is_reached": is_reached, **asdict(shown)})
    seconds = time.monotonic() - started
    return {
        **_about(), "goal_frac": GOAL_FRAC, "best_score": BEST_SCORE, "kl_limit_nats": KL_LIMIT_NATS,
        "iterations": ITERATIONS, "start": asdict(start), "runs": runs, "seconds": seconds,
        "has_learnt": all(one["is_reached"] for one in runs) and seconds <= LIMIT_S,
    }  # fmt: skip


def frontier() -> dict[str, Any]:
    """Train each method at each strength on as many generated responses; return score and KL of each."""
    started = time.monotonic()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), seed=0)
        for name in METHODS:
            for strength in FRONTIER[name]:
                shown, curve = run(name, task, Path(folder), strength=strength, iterations=FRONTIER_ITERATIONS, seed=0)
                print(f"{name} at {strength}: {shown}")
                runs.append({"method": name, "strength": strength, "curve": curve, **asdict(shown)})
        chosen = best_of_n(task, seed=0)
    responses = FRONTIER_ITERATIONS * RESPONSES_PER_ITERATION
    seconds = time.monotonic() - started
    return {**_about(), "responses": responses, "runs": runs, "best_of_n": chosen, "seconds": seconds}


def _about() -> dict[str, Any]:
    return {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
