"""Models that cap their logits (Gemma 2): whatever makes log-probabilities or logits says what the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
)

from pipeline_lib.errors import ConfigError
from pipeline_lib.generation.prefill import Prefiller
from pipeline_lib.losses.cross_entropy import CrossEntropy
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.logprobs import logit_cap, logits_of, require_known_logits, token_logps
from pipeline_lib.models.tiny import byte_tokenizer
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.text.pack import pack, pad
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipes.sft import KlPenalty, SftRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.trained_model import prepare
from tests.toy import DEMONSTRATIONS, LORA, World, layout, ppo_recipe, ppo_settings, settings, write_reward_model

CAP = 2.0
SHAPE: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "sliding_window": 8, "final_logit_softcapping": CAP,
}  # fmt: skip
CAPPED: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**SHAPE, query_pre_attn_scalar=8, attn_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**SHAPE, layer_types=["sliding_attention", "full_attention"]),
}


def make(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype)
    return model.eval()


@pytest.fixture(scope="module", params=list(CAPPED))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capped model with a tokenizer."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    make(CAPPED[request.param]).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def whole_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("kind", CAPPED)
def test_the_cap_is_read_and_felt(kind: str) -> None:
    model = make(CAPPED[kind])
    require_known_logits(model)
    assert logit_cap(model) == CAP
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    hidden = model.base_model(ids).last_hidden_state
    plain = model.get_output_embeddings()(hidden)
    assert float(plain.detach().abs().max()) > 1.5 * CAP
    torch.testing.assert_close(logits_of(model, hidden), model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", CAPPED)
def test_in_float64_packed_padded_and_the_models_own_logits_agree(kind: str) -> None:
    model = make(CAPPED[kind], torch.float64)
    rows = DEMONSTRATIONS[:3]
    expected = []
    for tree in rows:
        ids = [*tree.prompt_ids, *tree.response_ids[0]]
        logp = torch.log_softmax(whole_logits(model, ids)[:-1], dim=-1)
        expected.append(logp.gather(1, torch.tensor(ids[1:])[:, None])[len(tree.prompt_ids) - 1 :, 0])
    assert supports_trees(model)
    for batch in (pad(rows, pad_id=0), pack(rows)):
        found = token_logps(model, batch).token_logp_N
        assert found.dtype == torch.float64
        # Norms and rotations are float32 inside these models.
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


def test_a_loaded_models_prompts_are_continued_from_its_own_logits(folder: Path) -> None:
    model = load_causal_model(folder, dtype=torch.float32)
    prompts = [[9, 8, 7, 20, 21], [9, 8, 30], [9, 8, 7, 6, 5, 4, 3, 40, 41]]
    prefiller = Prefiller(model, prompts[0][:2], pad_id=0)
    with torch.no_grad():
        for prompt, prefilled in zip(prompts, prefiller.run(prompts), strict=True):
            torch.testing.assert_close(prefilled.logits_V, whole_logits(model, prompt)[-1], rtol=0, atol=1e-5)


def test_sft_with_smoothing_and_kl_is_that_of_the_whole_logits(folder: Path) -> None:
    chosen = settings(batch_size=3, adapter=LORA)
    policy = prepare(load_causal_model(folder, dtype=torch.float32), folder, chosen, seed=3)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    recipe = SftRecipe(
        policy, DataPlan.of(DEMONSTRATIONS[:3], chosen), layout(), objective=CrossEntropy(label_smoothing=0.2),
        kl=KlPenalty(0.5, Reference.of(policy)),
    )  # fmt: skip
    (batch,) = recipe.micro_batches(0)
    found = recipe.loss(batch, [batch])
    losses, kls = [], []
    with torch.no_grad():
        for tree in DEMONSTRATIONS[:3]:
            ids, start = [*tree.prompt_ids, *tree.response_ids[0]], len(tree.prompt_ids)
            own = whole_logits(policy.model, ids)[start - 1 : -1]
            with recipe.kl.reference.active() as reference:  # type: ignore[union-attr]
                theirs = whole_logits(reference, ids)[start - 1 : -1]
            labels = torch.tensor(ids[start:])
            losses.append(torch.nn.functional.cross_entropy(own, labels, reduction="none", label_smoothing=0.2))
            logp, logq = own.log_softmax(-1), theirs.log_softmax(-1)
            kls.append((logp.exp() * (logp - logq)).sum(-1))
    assert float(torch.cat(kls).mean()) > 1e-3
    expected = torch.cat(losses).mean() + 0.5 * torch.cat(kls).mean()
    assert float(found.loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_what_ppo_measures_of_its_samples_is_what_the_model_says(folder: Path, tmp_path: Path, world: World) -> None:
    chosen = ppo_settings(temperature=0.7, iterations=1)
    recipe = ppo_recipe(folder, write_reward_model(folder, tmp_path / "judge"), chosen, world=world)
    recipe.micro_batches(0)
    rollouts = recipe.rollouts
    assert rollouts is not None
    logps, entropies = [], []
    for tree in rollouts.trees:
        ids, start = [*tree.prompt_ids, *tree.response_ids[0]], len(tree.prompt_ids)
        with torch.no_grad():
            logp = torch.log_softmax(whole_logits(recipe.policy.model, ids)[start - 1 : -1] / 0.7, dim=-1)
        logps.append(logp.gather(1, torch.tensor(ids[start:])[:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(rollouts.logp_N, torch.cat(logps), rtol=0, atol=1e-4)
    torch.testing.assert_close(rollouts.ref_logp_N, torch.cat(logps), rtol=0, atol=1e-4)
    torch.testing.assert_close(rollouts.entropy_N, torch.cat(entropies), rtol=0, atol=1e-4)
    assert rollouts.full_kl_N is not None
    assert float(rollouts.full_kl_N.abs().max()) <= 1e-5


def test_recurrent_gemma_calls_its_cap_otherwise() -> None:
    config = RecurrentGemmaConfig(
        num_hidden_layers=3, vocab_size=259, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        logits_soft_cap=5.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert logit_cap(model) == 5.0


def test_any_other_change_of_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(LlamaConfig(**{name: value for name, value in SHAPE.items() if "cap" not in name}))
    assert logit_cap(model) is None
    require_known_logits(model)
    whole = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = whole(*args, **kwargs)
        output.logits = output.logits.relu()
        return output

    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(ConfigError, match="'llama' change their logits after the head in a way"):
        require_known_logits(model)
