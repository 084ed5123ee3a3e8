"""What TRL keeps of reference log-probabilities: `python -m benchmarks.peer_reference_cache MODEL OUTPUT [PLAN]`.

Runs in the environment that TRL is installed in. Every trainer is made anew in one process, over the
same rows and the same reference, as in a sweep. Noted are the rows scored, the seconds that took and
the figures kept. With a plan, only the sweep over beta is done, on the rows of its job.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from benchmarks.same import SWEPT_BETAS

_SWEEP_ROWS = 4
"""Rows of a scoring forward."""
_ROWS = "".join(
    json.dumps(
        {
            "prompt": f"The number {number} is ",
            "chosen": " and ".join(["even" if number % 2 == 0 else "odd"] * (2 + number % 3)),
            "rejected": "a colour of the sea",
        }
    )
    + "\n"
    for number in range(8)
)


def main() -> None:
    """Sweep what changes the reference's figures and what does not; write what TRL did."""
    model, output, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        if rest:
            plan = json.loads(Path(rest[0]).read_text())
            torch.set_num_threads(plan["options"]["threads"])
            rows = (Path(plan["folder"]) / "texts.jsonl").read_text()
            dtype = json.loads((Path(plan["folder"]) / "facts.json").read_text())["dtype"]
            sweep = _Sweep(
                model, Path(scratch) / "betas", rows, batch_size=plan["options"]["peer_rows"] or _SWEEP_ROWS,
                dtype=getattr(torch, dtype), is_on_cpu=plan["options"]["device"] == "cpu",
            )  # fmt: skip
            found = {"betas": [sweep.make(beta=beta, adapter=True) for beta in SWEPT_BETAS]}
        else:
            torch.set_num_threads(1)
            found = _sweeps(model, Path(scratch))
    Path(output).write_text(json.dumps(found))


def _sweeps(model: str, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    sweep, alone = (_Sweep(model, scratch / name, _ROWS, batch_size=4) for name in ("shared", "alone"))
    return {
        "same_again": [sweep.make(), sweep.make()],
        "betas": [sweep.make(beta=beta) for beta in SWEPT_BETAS],
        "output_dirs": [sweep.make(output=name) for name in ("one", "two")],
        "adapter_seeds": [sweep.make(seed=seed, adapter=True, max_length=None) for seed in (1, 2)],
        # Without a length limit TRL's fingerprint holds the rows and the weights alone.
        "ld_alpha": [sweep.make(ld_alpha=alpha, max_length=None) for alpha in (None, 0.0)],
        "ld_alpha_alone": [alone.make(ld_alpha=0.0, max_length=None)],
    }


class _Sweep:
    """Trainers over one data set, whose cache they share."""

    def __init__(
        self, model: str, folder: Path, rows: str, *, batch_size: int, dtype: torch.dtype = torch.float32,
        is_on_cpu: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.folder, self.batch_size = model, folder, batch_size
        self.dtype, self.is_on_cpu = dtype, is_on_cpu
        folder.mkdir()
        (folder / "rows.jsonl").write_text(rows)
        # Only rows that come out of a file have a cache at all.
        self.rows = load_dataset(
            "json", data_files=str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"), split="train"
        )

    def make(
        self, *, beta: float = 0.1, output: str = "out", seed: int = 0, adapter: bool = False,
        ld_alpha: float | None = None, max_length: int | None = 1024,
    ) -> dict[str, Any]:  # fmt: skip
        """Make a trainer that precomputes; return the rows it scored, the seconds, and its figures."""
        tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True)
        scored: list[int] = []
        seconds: list[float] = []
        compute = DPOTrainer.compute_ref_log_probs

        def counted(trainer: DPOTrainer, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
            started = time.perf_counter()
            figures = compute(trainer, model, inputs)
            seconds.append(time.perf_counter() - started)
            scored.append(inputs["input_ids"].shape[0] // 2)
            return figures

        DPOTrainer.compute_ref_log_probs = counted
        try:
            args = DPOConfig(
                output_dir=str(self.folder / output), beta=beta, seed=seed, ld_alpha=ld_alpha, max_length=max_length,
                precompute_ref_log_probs=True, per_device_train_batch_size=self.batch_size,
                bf16=self.dtype == torch.bfloat16, use_cpu=self.is_on_cpu,
                report_to="none", disable_tqdm=True,
            )  # fmt: skip
            trainer = DPOTrainer(
                AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype, local_files_only=True),
                args=args, train_dataset=self.rows, processing_class=tokenizer,
                peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None,
            )  # fmt: skip
        finally:
            DPOTrainer.compute_ref_log_probs = compute
        kept = trainer.train_dataset
        return {
            "scored_rows": sum(scored),
            "seconds": sum(seconds),
            "chosen": list(kept["ref_chosen_logps"]),
            "rejected": list(kept["ref_rejected_logps"]),
        }


if __name__ == "__main__":
    main()
