"""A synthetic run as artifacts in memory: what the report's tests read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline_lib.evaluation.report_card import ScoredRow, report_card
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.hashing import derive_seed, sha256_bytes
from pipeline_lib.schema import (
    ArtifactRef,
    CandidateVerdict,
    ExampleResult,
    FunnelStep,
    Interval,
    Message,
    Origin,
    Record,
    Rejection,
    Response,
    RuleResult,
    Verdict,
)
from pipeline_lib.storage.store import FileEntry, Manifest

HOSTILE = "<script>alert('x')</script> & <img src=x onerror=alert(1)>"

UNITS = {"kl": "nats a response"}


class FakeStore:
    """Artifacts in memory with the reading methods of the store."""

    def __init__(self) -> None:
        self.manifests: dict[ArtifactRef, Manifest] = {}
        self.contents: dict[tuple[ArtifactRef, str], bytes] = {}

    def add(
        self, stage: str, kind: str, inputs: dict[str, ArtifactRef], files: dict[str, bytes], **more: Any
    ) -> ArtifactRef:
        entries = {
            path: FileEntry(sha256=sha256_bytes(content), size_bytes=len(content)) for path, content in files.items()
        }
        manifest = Manifest(
            kind=kind, files=entries, stage=stage, stage_version=1, inputs=inputs,
            config=more.get("config", {"seed": 0, "stage": stage}), created_at="2025-11-21T08:03:11+00:00",
            versions={"torch": "2.13.0"}, measurements={"wall_s": 83.2, "peak_rss_bytes": 1.5 * 1024**3},
        )  # fmt: skip
        self.manifests[manifest.ref] = manifest
        for path, content in files.items():
            self.contents[manifest.ref, path] = content
        return manifest.ref

    def manifest(self, ref: ArtifactRef) -> Manifest:
        return self.manifests[ref]

    def read_json(self, ref: ArtifactRef, path: str) -> Any:
        return json.loads(self.contents[ref, path])

    def read_lines(self, ref: ArtifactRef, path: str) -> Iterator[bytes]:
        yield from self.contents[ref, path].splitlines()


def wave(*scope: str | int) -> float:
    """Return a number in -1 to 1 that looks random and is always the same."""
    return derive_seed(0, *scope) / 2**62 - 1


def jsonl(rows: list[Any]) -> bytes:
    return b"".join((row if isinstance(row, str) else json.dumps(row, allow_nan=True)).encode() + b"\n" for row in rows)


def record(number_of: int, num_responses: int) -> Record:
    responses = tuple(Response(content=f"answer {number_of}.{place}") for place in range(num_responses))
    ranks = tuple(range(1, num_responses + 1)) if num_responses > 1 else ()
    message = Message(role="user", content=f"What does function {number_of} do?")
    return Record.create((message,), responses, ranks, origin=Origin(source="pydoc", place="shutil", line=number_of))


def collected(store: FakeStore) -> ArtifactRef:
    steps = [
        FunnelStep(name="1 pydoc", rows_in=2210, rows_kept=2204, rejected={"E_EMPTY_RESPONSE": 6}),
        FunnelStep(name="2 people's pairs", rows_in=512, rows_kept=498, rejected={"E_TRUNCATED_ROW": 3, "E_JSON": 11}),
    ]
    rejections = [
        Rejection(
            code="E_JSON", reason="line is no JSON: expected ',' at column 41", stage="jsonl",
            origin=Origin(source="hh", place="data/pairs.jsonl", line=17), excerpt='{"chosen": "' + HOSTILE,
        ),
        Rejection(code="E_EMPTY_RESPONSE", reason="the answer is empty", stage="pydoc", origin=Origin(source="pydoc")),
    ]  # fmt: skip
    files = {
        "records.jsonl": b"", "funnel.json": json.dumps([step.model_dump() for step in steps]).encode(),
        "rejections.jsonl": jsonl([rejection.model_dump_json() for rejection in rejections]),
    }  # fmt: skip
    return store.add("collect", "rows", {}, files, config={"sources": [{"name": "pydoc"}], "max_rows": None})


def filtered(store: FakeStore, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
    names = [
        "unicode",
        "roles",
        "empty",
        "length",
        "length_ratio",
        "repetition",
        "duplicates",
        "contradictions",
    ]
    left, steps = 2702, []
    for place, name in enumerate(names):
        lost = [0, 0, 4, 212, 61, 18, 377, 9][place]
        steps.append(
            FunnelStep(
                name=name,
                rows_in=left,
                rows_kept=left - lost,
                rejected={f"E_{name.upper()}": lost} if lost else {},
            )
        )
        left -= lost
    refused = Rejection(
        code="E_LENGTH", reason="response has 1,430 tokens, the limit is 1,024", stage="length",
        origin=Origin(source="pydoc", place="argparse.ArgumentParser"), record=record(7, 1),
    )  # fmt: skip
    rows = {"sft": (60, 1), "reward": (30, 2), "policy": (30, 2), "reward_test": (10, 2), "gate": (12, 1)}
    files = {
        f"{split}.jsonl": jsonl([record(place, responses).model_dump_json() for place in range(rows_of)])
        for split, (rows_of, responses) in rows.items()
    }
    files["funnel.json"] = json.dumps([step.model_dump() for step in steps]).encode()
    files["rejections.jsonl"] = jsonl([refused.model_dump_json()])
    return store.add("filter", "dataset", inputs, files)


def metrics(stage: str, num_steps: int, start: float, end: float) -> bytes:
    rows = []
    for step in range(num_steps):
        loss = end + (start - end) * math.exp(-4 * step / num_steps) + 0.06 * start * wave(stage, step)
        rate = 1e-4 * min(1.0, (step + 1) / 10) * (1 - step / num_steps)
        rows.append({
            "step": step, "loss": loss, "grad_norm_policy": 1 + 0.3 * wave(stage, "g", step), "learning_rate": rate,
            "accuracy_frac": min(1.0, 0.5 + 0.4 * step / num_steps + 0.1 * wave(stage, "a", step)),
            "margin": step / num_steps, "log_ratio_margin_nats": 3 * step / num_steps,
        })  # fmt: skip
    rows[3]["grad_norm_policy"] = math.nan
    return jsonl(rows)


def ppo_files(num_iterations: int = 18) -> dict[str, bytes]:
    rows: list[dict[str, float]] = []
    samples = []
    for iteration in range(num_iterations):
        share = iteration / num_iterations
        rows += [
            {
                "step": 4 * iteration + place, "loss": 0.3 * (1 - share) + 0.05 * wave("p", iteration, place),
                "iteration": iteration, "score": 0.1 + 0.9 * share + 0.1 * wave("s", iteration),
                "ref_kl_nats": 5 * share + 0.4 * abs(wave("k", iteration)), "kl_coef": 0.2 * 0.97**iteration,
                "response_tokens": 42 - 9 * share + 2 * wave("t", iteration), "finished_frac": 0.6 + 0.3 * share,
                "entropy_nats": 2.1 - share, "policy_loss": -0.02, "value_loss": 0.4 * (1 - share),
                "shaped_score": 0.9 * share, "heldout_score": 0.1 + 0.5 * share - 0.4 * share**2,
                "ref_kl_k2_nats": 4 * share, "ref_kl_k3_nats": 4.5 * share, "reward/length_weighted": 0.2 * share,
                "reward/reward_model_weighted": 0.7 * share,
                "distinct_1_frac": 0.8, "distinct_2_frac": 0.9 - 0.1 * share,
            }
            for place in range(4)
        ]  # fmt: skip
        samples += [
            {"iteration": iteration, "prompt": f"user\nWhat does os.walk do? ({place})", "score": share + place,
             "response": HOSTILE if iteration == 0 else "Generate the file names in a directory tree by walking it."}
            for place in range(6)
        ]  # fmt: skip
    samples[-1]["score"] = math.nan
    facts = {"rows": 30, "breaches": ["iteration 7: <KL> too far", "iteration 18: too far"], "best_iteration": 15}
    return {
        "metrics.jsonl": jsonl(rows), "samples.jsonl": jsonl(samples), "training.json": json.dumps(facts).encode(),
    }  # fmt: skip


def grpo_files() -> dict[str, bytes]:
    rows = [
        {"step": at, "loss": 0.1, "policy_loss": 0.0, "kl_loss": 0.1, "iteration": at, "score": 0.1 * at,
         "ref_kl_nats": 0.5 * at}
        for at in range(4)
    ]  # fmt: skip
    return {"metrics.jsonl": jsonl(rows), "training.json": b"{}"}


def examples(name: str, quality: float, num_rows: int = 12) -> bytes:
    rows = []
    for place in range(num_rows):
        text = f"Return the {name} answer number {place}. " + "It copies a directory tree and returns the path. " * 2
        rows.append(ExampleResult(
            record_id=f"{place:064x}", reference="Recursively copy a directory tree and return the destination.",
            prompt=(Message(role="user", content=f"What does shutil.copytree do? ({place})"),),
            response=HOSTILE if place < 3 else text, response_tokens=40 + place, is_finished=place % 4 > 0,
            reference_nll_nats=30 * (1.2 - quality) + wave("n", place), reference_tokens=14,
            rouge_l_frac=min(1.0, max(0.0, quality * 0.6 + 0.1 * wave("r", place, name))),
            score=None if name == "sft" and place == 5 else 2 * quality - 1 + 0.5 * wave("c", place, name),
            logp=-40.0 + quality,
            reference_model_logp=-40.0 - 2 * quality,
        ).model_dump_json())  # fmt: skip
    return jsonl(rows)


def rule(
    text: str, metric: str, status: str, *values: float | None, threshold: float, against: str | None
) -> RuleResult:
    value, low, high = values
    return RuleResult(
        rule=text, metric=metric, against=against, unit=UNITS.get(metric, ""), threshold=threshold, status=status,  # type: ignore[arg-type]
        estimate=Interval(value=value, low=low, high=high, confidence_frac=0.95, num_examples=12),
        reason={"pass": "the lower bound is above the threshold", "fail": "the lower bound is below the threshold",
                "not_applicable": "there is no champion to compare with"}[status],
    )  # fmt: skip


def verdict_of(dpo: ArtifactRef, ppo: ArtifactRef | None, *, winner: str | None) -> Verdict:
    def rules(shift: float, status: str) -> tuple[RuleResult, ...]:
        return (
            rule("rouge_l against base: lower bound above 0", "rouge_l", "pass", 0.11 + shift, 0.06 + shift,
                 0.16 + shift, threshold=0.0, against="base"),
            rule("perplexity against base: upper bound below 1", "perplexity", "pass", 0.71, 0.64, 0.8, threshold=1.0,
                 against="base"),
            rule("win_rate against base: lower bound at least 0.5", "win_rate", status, 0.68 + shift, 0.51 + 2 * shift,
                 0.8 + shift, threshold=0.5, against="base"),
            rule("kl: at most 12", "kl", "pass" if winner else "fail", None, None, None, threshold=12, against=None),
            rule("win_rate against champion: lower bound at least 0.45", "win_rate", "not_applicable", None, None, None,
                 threshold=0.45, against="champion"),
        )  # fmt: skip

    candidates = [
        CandidateVerdict(name="dpo", model=dpo, is_passed=winner == "dpo", rules=rules(0.0, "pass"), rank_value=0.68)
    ]
    if ppo is not None:
        candidates.append(
            CandidateVerdict(name="ppo", model=ppo, is_passed=False, rules=rules(-0.04, "fail"), rank_value=None)
        )
    policy = {
        "select_by": {"name": "win_rate", "against": "base"},
        "confidence_frac": 0.95,
        "min_examples": 10,
    }
    return Verdict(candidates=tuple(candidates), winner=winner, champion=None, policy=policy)


def report_tables() -> dict[str, Any]:
    """The tables of a report card, and its further figures."""
    draw = random.Random(4)
    strengths = ("significantly", "better", "slightly", "unsure")
    rows = [
        ScoredRow(
            scores=(draw.gauss(1.0, 1.2), draw.gauss(0.0, 1.2)), ranks=(1, 2), strength=strengths[n % 4],
            lengths_words=(draw.randint(5, 90), draw.randint(5, 90)),
        )
        for n in range(64)
    ]  # fmt: skip
    card = report_card(rows, Bootstrap(resamples=200)).model_dump(mode="json")
    kept = ("test_auc_frac", "test_brier", "test_calibration_error_frac", "test_accuracy_longer_worse_frac")
    return {**{name: card["figures"][name] for name in kept}, **{k: v for k, v in card.items() if k != "figures"}}


def synthetic_run(store: FakeStore, *, winner: str | None = "dpo", with_ppo: bool = True) -> dict[str, ArtifactRef]:
    """Fill the store with a whole run; returns the report stage's inputs."""
    base = store.add("base_model", "model", {}, {"model/config.json": b"{}"}, config={"source": "SmolLM2"})
    dataset = filtered(store, {"rows": collected(store), "base_model": base})
    facts = b'{"rows": 60, "dtype": "bfloat16"}'
    sft = store.add("sft", "model", {"base_model": base, "dataset": dataset},
                    {"metrics.jsonl": metrics("sft", 120, 3.1, 2.2), "training.json": facts})  # fmt: skip
    card = {"test_accuracy_frac": 0.84375, "test_margin": 1.37, "test_pairs": 64.0, "length_bias_per_word": math.nan,
            "normalization_gain": 0.8, "normalization_bias": -0.12, **report_tables()}  # fmt: skip
    reward = store.add("reward", "reward_model", {"sft_model": sft, "dataset": dataset},
                       {"metrics.jsonl": metrics("reward", 60, 0.7, 0.35),
                        "report_card.json": json.dumps(card).encode()})  # fmt: skip
    logps = store.add(
        "reference_logps", "reference_logps", {"sft_model": sft, "dataset": dataset}, {"logps.json": b"{}"}
    )
    dpo = store.add("preference", "model", {"sft_model": sft, "dataset": dataset, "reference_logps": logps},
                    {"metrics.jsonl": metrics("preference", 20, 0.693, 0.4), "training.json": facts})  # fmt: skip
    models = {"base": (base, 0.3), "sft": (sft, 0.5), "dpo": (dpo, 0.8)}
    ppo = None
    if with_ppo:
        ppo = store.add("ppo", "model", {"sft_model": sft, "reward_model": reward, "dataset": dataset}, ppo_files())
        models["ppo"] = (ppo, 0.65)
    inputs = {"reward_model": reward}
    for name, (model, quality) in models.items():
        inputs[f"evaluation:{name}"] = store.add(
            "evaluate", "evaluation",
            {"model": model, "reference_model": sft, "reward_model": reward, "dataset": dataset},
            {"examples.jsonl": examples(name, quality)},
        )  # fmt: skip
    verdict = store.add("gate", "verdict", inputs,
                        {"verdict.json": verdict_of(dpo, ppo, winner=winner).model_dump_json().encode()})  # fmt: skip
    return {"verdict": verdict, "dataset": dataset}


@pytest.fixture(scope="session")
def synthetic() -> SimpleNamespace:
    """What builds runs: the store, a whole run, and pieces of one."""
    return SimpleNamespace(
        store=FakeStore,
        run=synthetic_run,
        metrics=metrics,
        examples=examples,
        rule=rule,
        hostile=HOSTILE,
        grpo_files=grpo_files,
    )
