"""The comparison of PPO with TRL's as a section of docs/performance.md, between its markers."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from benchmarks.page import write_between
from benchmarks.ppo_peer_jobs import PRESETS, PpoResult

_HEAD = (
    "| preset | responses/s, ours / TRL | times faster (goal) | peak memory, ours / TRL | share (goal) | "
    "mean rule at the start | after equal responses, ours / TRL | KL then (nats), ours / TRL |\n"
    "|---|---|---|---|---|---|---|---|"
)


def write_section(results: Path, page: Path) -> str:
    """Write the results of a folder between the page's markers.

    Returns:
        The generated part.

    Raises:
        ValueError: The page lacks the markers.
    """
    found = [PpoResult.model_validate_json(path.read_bytes()) for path in results.glob("*.json")]
    order = list(PRESETS)
    generated = render(sorted(found, key=lambda result: order.index(result.name)))
    write_between(page, "ppo-peer", generated)
    return generated


def render(results: list[PpoResult]) -> str:
    """Return a table of results, and what each preset is."""
    if not results:
        return "Not measured yet."
    lines = [_HEAD, *(_line(result) for result in results), ""]
    lines += [f"- `{result.name}`: {_note(result)}" for result in results]
    return "\n".join(lines)


def _line(result: PpoResult) -> str:
    ours, peer = result.runs["ours"], result.runs["peer"]
    preset = result.preset
    timed = (preset.iterations - 1) * preset.batch_size
    rates = [median(timed / run.timed_s for run in runs) for runs in (ours, peer)]
    faster = median(theirs.timed_s / mine.timed_s for mine, theirs in zip(ours, peer, strict=True))
    memory = [median(run.peak_bytes for run in runs) / 2**30 for runs in (ours, peer)]
    scores = [median(run.last_score for run in runs) for runs in (ours, peer)]
    kl = [median(run.kl_nats[-1] for run in runs) for runs in (ours, peer)]
    start = median(run.scores[0] for run in (*ours, *peer))
    goals = [
        "" if goal is None else f" ({sign} {goal:g})"
        for sign, goal in (("≥", preset.speed_goal), ("≤", preset.memory_goal))
    ]
    return (
        f"| `{result.name}` | {rates[0]:.2f} / {rates[1]:.2f} | {faster:.2f} ×{goals[0]} | "
        f"{memory[0]:.2f} / {memory[1]:.2f} GiB | {memory[0] / memory[1]:.2f}{goals[1]} | "
        f"{start:.3f} | {scores[0]:.3f} / {scores[1]:.3f} | {kl[0]:.1f} / {kl[1]:.1f} |"
    )


def _note(result: PpoResult) -> str:
    preset, ours, peer = result.preset, result.runs["ours"][0], result.runs["peer"][0]
    versions = ", ".join(f"{name} {version}" for name, version in peer.versions.items())
    what = f"LoRA, rank {preset.lora_rank}" if preset.trainable == "lora" else "every weight"
    length = f"at most {preset.new_tokens}" if preset.stops_at_eos else f"exactly {preset.new_tokens}"
    return (
        f"{what} of policy and value function, {preset.iterations} iterations of {preset.batch_size} responses of "
        f"{length} tokens, {preset.minibatches} minibatches, {preset.ppo_epochs} passes; medians of "
        f"{preset.runs} paired runs; {result.processor}. Trained numbers: {ours.trainable_parameters:,} / "
        f"{peer.trainable_parameters:,}. TRL: {peer.note}; {versions}"
    )
