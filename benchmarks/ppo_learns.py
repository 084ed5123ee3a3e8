"""Does it learn? Each part trains by the real recipes and measures on fresh samples, within minutes on a CPU.

`python -m benchmarks.ppo_learns PART`, where PART is
  learn       PPO, RLOO and GRPO on a rule from three seeds each; fails where one stays below 90 % of the
              best score or goes further than the KL limit
  language    PPO on SmolLM2-135M against a reward model; a second one, of other pairs, only measures; fails
              where the score's intervals are not apart, the KL is above its limit or the second one's score falls
  frontier    every method at several strengths of its KL, at equal generated responses: score against KL
  controlled  DPO against PPO where a known reward labels the pairs: true score against KL
  all         all of these
  language_hh as language, on people's choices instead of documentation: --hh FOLDER has helpful-base.jsonl.gz
  page        only draw and write again what is there
Each writes JSON and SVG, and its part of docs/performance.md between the markers. No network.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.learns_controlled import sweep
from benchmarks.learns_language import Training, language
from benchmarks.learns_language_models import Preparation
from benchmarks.learns_language_rows import Kind
from benchmarks.learns_methods import METHODS, RESPONSES_PER_ITERATION, SAMPLES_MEASURED, best_of_n, run
from benchmarks.learns_optimum import best_possible
from benchmarks.learns_plots import DRAWN
from benchmarks.learns_report import write_section
from benchmarks.learns_task import BEST_SCORE, make_task, measure
from pipeline_lib.training.settings import OfflineSettings

SEEDS = (0, 1, 2)
ITERATIONS = 40
STRENGTHS = {"ppo": 0.01, "rloo": 0.01, "grpo": 0.1}
"""KL weights of the runs that must learn."""
GOAL_FRAC = 0.9
KL_LIMIT_NATS = 15.0
FRONTIER_ITERATIONS = 20
CONTROLLED_ITERATIONS = 20
OPTIMUM_SAMPLES = 64
"""Samples of each prompt and model by which the best possible frontier is estimated."""
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
    parser.add_argument("part", choices=(*PARTS, *LANGUAGE, "all", "page"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/learns"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--threads", type=int, help="default: 1, and 2 with the language model")
    parser.add_argument("--hh", type=Path, default=Path(), help="folder of HH-RLHF's rows")
    parser.add_argument("--work", type=Path, help="keep the models that part language starts from in this folder")
    chosen = parser.parse_args()
    parts = PARTS | {
        name: partial(
            language, work=chosen.work, plan=Preparation(kind=kind), training=Training(), rows_folder=chosen.hh
        )
        for name, kind in LANGUAGE.items()
    }
    chosen.results.mkdir(parents=True, exist_ok=True)
    has_learnt = True
    for name, part in parts.items():
        if chosen.part == name or (chosen.part == "all" and name != "language_hh"):
            torch.set_num_threads(chosen.threads or (2 if name in LANGUAGE else 1))
            with tempfile.TemporaryDirectory() as folder:
                started, cpu_started = time.monotonic(), time.process_time()
                found = {**part(Path(folder)), **_about()}
            found |= {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu_started}
            print(f"{name}: {found['seconds']:.0f} s, of one core {found['cpu_seconds']:.0f} s", flush=True)
            has_learnt = has_learnt and all(run.get("is_reached", True) for run in found["runs"])
            _write(chosen.results / f"{name}.json", found)
    for name, draw in DRAWN.items():
        if (chosen.results / f"{name}.json").exists():
            draw(json.loads((chosen.results / f"{name}.json").read_bytes()), chosen.results / f"{name}.svg")
    write_section(chosen.results, chosen.page)
    sys.exit(0 if has_learnt else 1)


def learn(folder: Path) -> dict[str, Any]:
    """Train each method from each seed; return what fresh samples show."""
    runs = []
    task = make_task(folder, seed=0)
    start = measure(task, task.policy(OfflineSettings(adapter=None)), samples=SAMPLES_MEASURED, seed=0)
    print(f"start: {start}", flush=True)
    for seed in SEEDS:
        for name, strength in STRENGTHS.items():
            began = time.monotonic()
            found = run(name, task, folder, strength=strength, iterations=ITERATIONS, seed=seed)
            spent, shown = time.monotonic() - began, found.shown
            is_reached = shown.score >= GOAL_FRAC * BEST_SCORE and shown.kl_nats <= KL_LIMIT_NATS
            print(f"{name}, seed {seed}: {shown}, {spent:.0f} s, {'reached' if is_reached else 'missed'}", flush=True)
            about = {"method": name, "seed": seed, "strength": strength, "seconds": spent}
            runs.append({**about, "is_reached": is_reached, **found.plain()})
    return {
        "goal_frac": GOAL_FRAC, "best_score": BEST_SCORE, "kl_limit_nats": KL_LIMIT_NATS,
        "iterations": ITERATIONS, "start": asdict(start), "runs": runs,
    }  # fmt: skip


def frontier(folder: Path) -> dict[str, Any]:
    """Train each method at each strength on as many generated responses; return score and KL of each."""
    runs, policies = [], []
    task = make_task(folder, seed=0)
    for name in METHODS:
        for strength in FRONTIER[name]:
            began = time.monotonic()
            found = run(name, task, folder, strength=strength, iterations=FRONTIER_ITERATIONS, seed=0)
            print(f"{name} at {strength}: {found.shown}, {time.monotonic() - began:.0f} s", flush=True)
            runs.append({"method": name, "strength": strength, **found.plain()})
            if name == "ppo":
                policies.append(found.trained.policy.model)
    return {
        "responses": FRONTIER_ITERATIONS * RESPONSES_PER_ITERATION, "runs": runs, "best_of_n": best_of_n(task, seed=0),
        "best_possible": best_possible(task, policies, samples=OPTIMUM_SAMPLES, seed=0),
    }  # fmt: skip


def controlled(folder: Path) -> dict[str, Any]:
    """Sweep DPO and PPO where a known reward labels the pairs; return true score and KL of each."""
    task = make_task(folder, seed=0)
    found, policies = sweep(task, folder, iterations=CONTROLLED_ITERATIONS, seed=0)
    return {**found, "best_possible": best_possible(task, policies, samples=OPTIMUM_SAMPLES, seed=0)}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "learn": learn, "frontier": frontier, "controlled": controlled
}  # fmt: skip
LANGUAGE: dict[str, Kind] = {"language": "documentation", "language_hh": "hh"}


def _about() -> dict[str, Any]:
    return {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
