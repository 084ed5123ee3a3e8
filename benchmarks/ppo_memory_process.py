"""One process of `ppo_memory`: `python -m benchmarks.ppo_memory_process sft|shared|apart PLAN`."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from benchmarks.ppo_peer_jobs import PpoPlan, Prepared
from benchmarks.ppo_peer_ours import PROMPTS_FILE, Told, lora, policy_of, ppo_recipe, run, settings_of
from benchmarks.rows import records
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.settings import OfflineSettings


def main() -> None:
    """Train what the command line says and write down how much memory the process held."""
    kind, path = sys.argv[1:]
    plan = PpoPlan.model_validate_json(Path(path).read_bytes())
    torch.set_num_threads(plan.threads)
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = Prepared.model_validate_json((plan.folder / PROMPTS_FILE).read_bytes())
    told = sft(plan, found) if kind == "sft" else ppo(plan, found, is_shared=kind == "shared")
    figures = {
        "peak_bytes": told.peak_bytes, "before_bytes": before_bytes, "steps": len(told.series),
        "tokens_per_batch": plan.preset.tokens_per_batch,
    }  # fmt: skip
    plan.output.write_text(json.dumps(figures))


def sft(plan: PpoPlan, found: Prepared) -> Told:
    """SFT with LoRA: as many steps as PPO makes, on as many rows as it has responses."""
    preset, ours = plan.preset, settings_of(plan.preset)
    settings = OfflineSettings(
        batch_size=preset.batch_size, epochs=preset.ppo_epochs, tokens_per_batch=preset.tokens_per_batch,
        adapter=lora(preset), precision=ours.precision, optimizer=ours.optimizer, seed=preset.seed,
    )  # fmt: skip
    chat = ChatTokenizer.load(found.model)
    encoder = Encoder(chat, 512, 512)
    rows = records(encoder, count=preset.responses, responses=1, seed=preset.seed)
    policy = policy_of(found.model, settings)
    layout = Layout(policy.is_packed, chat.pad_id, settings.tokens_per_batch)
    return run(SftRecipe(policy, DataPlan.of([encoder.tree(row) for row in rows], settings), layout), settings)


def ppo(plan: PpoPlan, found: Prepared, *, is_shared: bool) -> Told:
    """PPO against the reward model itself."""
    settings = settings_of(plan.preset)
    return run(ppo_recipe(found, settings, plan.folder, scorer=None, is_shared=is_shared), settings)


if __name__ == "__main__":
    main()
