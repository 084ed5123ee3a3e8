"""Peak memory of PPO beside that of SFT: `python -m benchmarks.ppo_memory`.

SFT with LoRA, PPO with policy, reference, reward model and value function on one base, and PPO with
a second base for the latter two, each in a process of its own, on the same model, adapters and
tokens a forward. The driver itself imports no torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import write_between
from benchmarks.peers import ROOT, WORK
from benchmarks.ppo_peer import run_process
from benchmarks.ppo_peer_jobs import PRESETS, PpoPlan

RESULTS = Path(__file__).parent / "results" / "ppo-memory" / "smollm2.json"
PAGE = ROOT / "docs" / "performance.md"
KINDS = ("sft", "shared", "apart")
GOAL = 1.6
SIZE = {"iterations": 1, "batch_size": 8, "minibatches": 1, "ppo_epochs": 2}
"""Two steps, each of more tokens than one forward takes, so that the largest forward is a full one."""

logger = logging.getLogger("benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all three, write the result and its line in docs/performance.md; 1 where the goal is missed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_memory", description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trial", action="store_true", help="keep nothing")
    chosen = parser.parse_args(arguments)
    preset = PRESETS["smollm2"].model_copy(update=SIZE)
    plan = PpoPlan(
        side="ours", preset=preset, threads=chosen.threads, folder=WORK / "ppo-memory", output=WORK / "ppo-memory.json"
    )
    run_process(plan, sys.executable, ["-m", "benchmarks.ppo_peer_ours", "prepare"])
    found: dict[str, Any] = {}
    for kind in KINDS:
        run_process(plan, sys.executable, ["-m", "benchmarks.ppo_memory_process", kind])
        found[kind] = json.loads(plan.output.read_text())
        logger.info("%s: %.2f GiB", kind, found[kind]["peak_bytes"] / 2**30)
    ratio = found["shared"]["peak_bytes"] / found["sft"]["peak_bytes"]
    result = {"threads": chosen.threads, "goal": GOAL, "ratio": ratio, **found}
    print(line(result))
    if not chosen.trial:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        write_between(PAGE, "ppo-memory", line(result))
    return 0 if ratio <= GOAL else 1


def line(result: dict[str, Any]) -> str:
    """Return the result in words."""
    peak = {kind: result[kind]["peak_bytes"] / 2**30 for kind in KINDS}
    held = result["sft"]["before_bytes"] / 2**30
    return (
        f"SmolLM2-135M in fp32, LoRA, forwards of at most {result['sft']['tokens_per_batch']} tokens, "
        f"{result['threads']} threads: SFT peaks at {peak['sft']:.2f} GiB, PPO at {peak['shared']:.2f} GiB, "
        f"**{result['ratio']:.2f} ×** as much (goal: ≤ {result['goal']:g}); with a second base for reward model and "
        f"value function {peak['apart']:.2f} GiB, {peak['apart'] / peak['sft']:.2f} ×. Before a model is loaded a "
        f"process holds {held:.2f} GiB."
    )


if __name__ == "__main__":
    raise SystemExit(main())
