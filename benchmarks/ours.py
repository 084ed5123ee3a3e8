"""One process of our side: prepare a job's inputs, or measure its stage.

`python -m benchmarks.ours prepare|measure|sweep PLAN`. The stages and the loop are the real ones; they
are watched, never replaced.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks.digests import sequence_digest, step_digest
from benchmarks.jobs import JOBS, Measured, Plan, StepsFile
from benchmarks.prepare import prepare_inputs
from benchmarks.same import SWEPT_BETAS
from benchmarks.work import matmul_rates, needed_work, processor_name
from benchmarks.workbench import Heard, Workbench, at_training, read_inputs, stage_config, timed_reference
from pipeline_lib.models.precision import default_device, resolve_dtype
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.loop import TrainingLoop


def main() -> None:
    """Do what the command line says."""
    action, path = sys.argv[1:]
    plan = Plan.model_validate_json(Path(path).read_bytes())
    torch.set_num_threads(plan.options.threads)
    {"prepare": prepare, "measure": measure, "sweep": sweep}[action](plan)


def prepare(plan: Plan) -> None:
    """Make a job's inputs, and write what the other side needs: model, first weights, rows by update."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    bench = Workbench(plan.folder.parent)
    prepared = prepare_inputs(bench, plan)
    facts: dict[str, object] = {}

    def export(loop: TrainingLoop) -> None:
        steps = [loop.recipe.micro_batches(step) for step in range(loop.recipe.num_steps)]
        assert len(steps) == plan.options.steps, (len(steps), plan.options.steps)
        rows = [[_row(tree) for batch in batches for tree in batch.trees] for batches in steps]
        file = StepsFile(steps=rows, pack_bins=prepared.pack_bins)
        (plan.folder / "steps.json").write_text(file.model_dump_json())
        first = {name: value.detach().cpu().contiguous() for group in loop.groups for name, value in
                 group.parameters.items()}  # fmt: skip
        save_file(first, plan.folder / "first.safetensors")
        timed = [tree for batches in steps[1:] for batch in batches for tree in batch.trees]
        config = AutoConfig.from_pretrained(prepared.model, local_files_only=True)
        has_head = JOBS[plan.job].stage != "reward"
        facts["work"] = needed_work(timed, config, trainable=plan.options.trainable, has_head=has_head).model_dump()

    with at_training(export, train=False):
        bench.run(JOBS[plan.job].stage, stage_config(plan.job, plan.options), read_inputs(plan.folder))
    facts |= {
        "model": str(prepared.model),
        "dtype": str(resolve_dtype(plan.options.precision)).removeprefix("torch."),
        "processor": processor_name(default_device()),
        "matmul_flops": matmul_rates(default_device()),
    }
    (plan.folder / "facts.json").write_text(json.dumps(facts))


def measure(plan: Plan) -> None:
    """Train once and write down what it took."""
    spec = JOBS[plan.job]
    bench = Workbench(plan.folder.parent)
    inputs = read_inputs(plan.folder)
    config = stage_config(plan.job, plan.options)
    if plan.side == "ours_pairs":
        inputs = {**inputs, "dataset": inputs["pairs"]}
        config["batch_size"] *= spec.responses * (spec.responses - 1) // 2
    spent: list[float] = []
    if plan.job == "dpo_in_step":
        with timed_reference(spent):
            inputs["reference_logps"] = bench.run("reference_logps", {"precision": config["precision"]}, inputs)
        assert spent, "the reference pass no longer goes through scoring.response_logps"
    seen: dict[str, object] = {}
    peak: list[int] = []
    heard = Heard(on_step=lambda: peak.append(peak_bytes()))

    def look(loop: TrainingLoop) -> None:
        steps = [loop.recipe.micro_batches(step) for step in range(loop.recipe.num_steps)]
        labelled = spec.stage != "reward"
        seen["digests"] = [step_digest(_digests(batches, labelled=labelled)) for batches in steps]
        packed = [batch for batches in steps for batch in batches]
        seen["tokens"] = sum(
            len(tree.prompt_ids) + len(ids) for batch in packed for tree in batch.trees for ids in tree.response_ids
        )
        seen["counted_tokens"] = sum(batch.num_counted for batch in packed) if labelled else 0
        seen["trainable_parameters"] = sum(
            value.numel() for group in loop.groups for value in group.parameters.values()
        )

    with at_training(look, train=True):
        bench.run(spec.stage, config, inputs, heard)
    measured = Measured.model_validate(
        {
            "side": plan.side, "losses": heard.losses, "step_ends_s": heard.step_ends_s,
            "reference_s": sum(spent), "peak_bytes": peak[-1], "peak_gpu_bytes": _peak_gpu_bytes(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
            **seen,
        }
    )  # fmt: skip
    plan.output.write_text(measured.model_dump_json())


def sweep(plan: Plan) -> None:
    """Score the reference as three runs that differ in beta ask for it; write the seconds of each."""
    bench = Workbench(plan.folder.parent)
    inputs = read_inputs(plan.folder)
    seconds = []
    for beta in SWEPT_BETAS:
        config = {**stage_config(plan.job, plan.options), "loss": {"name": "dpo", "beta": beta}}
        wanted = PreferenceConfig.model_validate(config).reference_logps()
        spent: list[float] = []
        with timed_reference(spent):
            bench.run("reference_logps", wanted.model_dump(mode="json"), inputs)
        seconds.append(sum(spent))
    plan.output.write_text(json.dumps(seconds))


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_gpu_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _row(tree: Tree) -> dict[str, object]:
    return {"prompt": list(tree.prompt_ids), "responses": [list(ids) for ids in tree.response_ids]}


def _digests(batches: Sequence[TreeBatch], *, labelled: bool) -> list[int]:
    """Return the digest of every (prompt, response) of an update, labels as the loss will see them."""
    found = []
    for batch in batches:
        labels: list[list[int]] = [[] for _ in range(batch.num_responses)]
        for label, response in zip(batch.label_N.tolist(), batch.response_N.tolist(), strict=True):
            labels[response].append(label)
        sequences = [(*tree.prompt_ids, *ids) for tree in batch.trees for ids in tree.response_ids]
        found += [
            sequence_digest(ids, counted if labelled else ()) for ids, counted in zip(sequences, labels, strict=True)
        ]
    return found


if __name__ == "__main__":
    main()
