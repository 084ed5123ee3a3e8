"""What `ppo_learns` found about PPO on a language model, as a part of docs/performance.md."""

from __future__ import annotations

from typing import Any

from benchmarks.learns_language_rows import Kind

Found = dict[str, Any]

_PAIRS: dict[Kind, str] = {
    "documentation": "The demo's task: the prompt asks what a function of Python's standard library does; of each pair "
    "its documentation is the good answer, the start's own the other.",
    "hh": "The pairs are people's choices (HH-RLHF, helpful), the ends of prompts and the beginnings of answers.",
}


def language_part(found: Found, plot: str) -> str:
    """Return the text, the plot, the table, the verdicts and some answers."""
    lines = [f"{_intro(found)} {_spent(found)}", "", plot, "", "| reward model | before | after | gain |"]
    lines.append("|---|---|---|---|")
    for name, label in (("proxy", "proxy"), ("heldout", "held out")):
        lines.append(
            f"| {label} | " + " | ".join(_range(found[name][when]) for when in ("before", "after", "gain")) + " |"
        )
    verdicts = found["verdicts"]
    lines += [
        "",
        f"- reward up, intervals apart: **{_yes(verdicts['is_up_apart'])}**",
        f"- KL at most {found['kl_limit_nats']:.0f} nats: **{_yes(verdicts['is_near'])}**, "
        f"{_range(found['kl_nats'])} a response",
        f"- held-out reward not down: **{_yes(verdicts['is_heldout_not_down'])}**",
        f"- tokens a response {found['tokens_before']:.1f}, then {found['tokens_after']:.1f}; ended by itself "
        f"{found['finished_frac_before']:.0%}, then {found['finished_frac_after']:.0%}; entropy of a token "
        f"{found['entropy_nats_before']:.2f}, then {found['entropy_nats_after']:.2f} nats",
        "",
        "| prompt | before | after |",
        "|---|---|---|",
    ]
    lines += [
        "| " + " | ".join(_cell(row[name]) for name in ("prompt", "before", "after")) + " |" for row in found["samples"]
    ]
    return "\n".join(lines)


def _intro(found: Found) -> str:
    sizes, training, right = found["sizes"], found["training"], found["test_accuracy_frac"]
    return (
        f"**SmolLM2-135M against a reward model.** {_PAIRS[found['kind']]} SFT on {sizes['sft']} rows makes the start. "
        f"Two reward models, each of {sizes['reward']} pairs of other rows, put the other's pairs in order in "
        f"{right['proxy']:.0%} (proxy) and {right['heldout']:.0%} (held out); on the start's answers their scores "
        f"correlate by {found['agreement']:.2f}. PPO (LoRA, one base for all models, KL weight "
        f"{training['kl_coef']:g}) trains against the proxy: {training['iterations']} iterations of "
        f"{training['rollouts']} responses. {sizes['test']} held-out prompts are answered before and after with one "
        "seed; scores are in standard deviations of the start's, intervals are of the bootstrap over prompts, gains "
        "are paired."
    )


def _spent(found: Found) -> str:
    """Tell the minutes of preparation and training, each piece counted when it was made."""
    spent = found["spent"]
    seconds = {name: one["seconds"] for name, one in spent.items()}
    cpu_seconds = sum(one["cpu_seconds"] for one in spent.values())
    models = sum(seconds[name] for name in ("base", "start", "answers", "proxy", "heldout"))
    measuring = seconds["measure_before"] + seconds["measure_after"]
    return (
        f"{sum(seconds.values()) / 60:.1f} minutes on {found['threads']} threads, {cpu_seconds / 60:.1f} of one core: "
        f"start and reward models {models / 60:.1f}, PPO {seconds['ppo'] / 60:.1f}, measuring {measuring / 60:.1f}."
    )


def _range(found: Found) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _yes(verdict: bool) -> str:
    return "yes" if verdict else "no"


def _cell(text: str) -> str:
    """Return a text as a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
