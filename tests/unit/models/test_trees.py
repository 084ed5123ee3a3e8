"""One batch form on every model: packed trees, padded rows and single runs say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pipeline_lib.models import trees as trees_of_models
from pipeline_lib.models.attention import TREE_ATTENTION
from pipeline_lib.models.backbone import hidden_states
from pipeline_lib.models.heads import head_of, init_head, scores
from pipeline_lib.models.logprobs import require_known_logits, token_logps
from pipeline_lib.models.scoring import Layout, response_logps
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.models.virtual_tokens import fresh_tokens
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch, pack, pad

torch.set_num_threads(1)  # models this small only lose by more, the more so on a busy machine

VOCABULARY = 67
WINDOW = 4
"""Shorter than the texts below, so that layers with a window must cut."""
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = {"intermediate_size": 64, "num_key_value_heads": 2}
HEADED: dict[str, Any] = {**GROUPED, "head_dim": 8}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZE, **GROUPED),
    "mistral": MistralConfig(**SIZE, **GROUPED, sliding_window=None),
    "mistral with a window": MistralConfig(**SIZE, **GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZE, **GROUPED),
    "qwen3": Qwen3Config(**SIZE, **HEADED),
    "gemma": GemmaConfig(**SIZE, **HEADED),
    "gemma2": Gemma2Config(
        **SIZE, **HEADED, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZE, **HEADED, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=5.0,
    ),
    "granite": GraniteConfig(**SIZE, **GROUPED, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere": CohereConfig(**SIZE, **GROUPED, logit_scale=0.25),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    ),
    "gpt_neox": GPTNeoXConfig(**SIZE, intermediate_size=64),
    "opt": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3, dropout=0.0,
    ),
}  # fmt: skip


def ids(start: int, length: int) -> tuple[int, ...]:
    return tuple(3 + (start * 7 + 5 * offset) % (VOCABULARY - 3) for offset in range(length))


def tree(name: str, prompt: tuple[int, ...], *responses: tuple[int, ...], counts: tuple[int, ...] = ()) -> Tree:
    return Tree(name, prompt, responses, tuple(place in counts for place in range(len(prompt))))


SHARED = ids(1, 6)
FORESTS: dict[str, list[Tree]] = {
    "K = 1 to 4, one beginning": [
        tree("a", (*SHARED, *ids(2, 3)), ids(3, 7)),
        tree("b", (*SHARED, *ids(4, 1)), ids(5, 2), ids(6, 9)),
        tree("c", (*SHARED, *ids(7, 4)), ids(8, 1), ids(9, 5), ids(10, 3)),
        tree("d", (*SHARED, *ids(11, 2)), ids(12, 4), ids(13, 4), ids(14, 6), ids(15, 1)),
    ],
    "nothing shared": [
        tree("a", ids(20, 9), ids(21, 3), ids(22, 8)),
        tree("b", ids(23, 1), ids(24, 5)),
        tree("c", ids(25, 5), ids(26, 2), ids(27, 2), ids(28, 2)),
    ],
    "several turns": [
        tree("a", (*SHARED, *ids(30, 8)), ids(31, 4), counts=(7, 8, 9, 13)),
        tree("b", (*SHARED, *ids(32, 5)), ids(33, 6), counts=(4, 5, 10)),
    ],
    "one tree": [tree("a", ids(40, 11), ids(41, 6), ids(42, 2))],
}  # fmt: skip


def make(config: PreTrainedConfig, *, seed: int = 3) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def one_by_one(model: PreTrainedModel, forest: list[Tree]) -> Tensor:
    """Each text run alone through transformers' own forward and full logits."""
    found = []
    for member in forest:
        for branch in member.response_ids:
            whole = torch.tensor([[*member.prompt_ids, *branch]])
            logp_TV = torch.log_softmax(model(whole).logits[0, :-1], dim=-1)
            logp_T = logp_TV.gather(1, whole[0, 1:, None])[:, 0]
            found.append(logp_T[torch.tensor([*member.prompt_counts[1:], *[True] * len(branch)])])
    return torch.cat(found)


def gradients(model: PreTrainedModel, logp_N: Tensor) -> dict[str, Tensor]:
    """Of all parameters, for uneven weights of the tokens."""
    model.zero_grad(set_to_none=True)
    (logp_N * torch.linspace(-1, 2, len(logp_N))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_padded_and_single_runs_say_the_same(kind: str, forest: str) -> None:
    rows = FORESTS[forest]
    plain = make(CONFIGS[kind])  # with transformers' own attention throughout
    expected_N = one_by_one(plain, rows)
    expected = gradients(plain, expected_N)
    assert expected.keys() == dict(plain.named_parameters()).keys()

    model = make(CONFIGS[kind])
    assert supports_trees(model)
    assert model.config._attn_implementation == TREE_ATTENTION
    for batch in (pack(rows), pad(rows, pad_id=0)):
        found_N = token_logps(model, batch).token_logp_N
        torch.testing.assert_close(found_N, expected_N, rtol=0, atol=1e-5)
        found = gradients(model, found_N)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # Relative to the largest entry: sums over many tokens cancel in the small ones.
            apart = float((found[name] - gradient).abs().max())
            assert apart <= 1e-5 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_recomputed_activations_give_the_same_gradients(kind: str) -> None:
    model = make(CONFIGS[kind])
    assert supports_trees(model)
    batch = pack(FORESTS["K = 1 to 4, one beginning"])
    expected = gradients(model, token_logps(model, batch).token_logp_N)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = gradients(model, token_logps(model, batch).token_logp_N)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2", "opt"])
def test_scores_at_the_last_token_are_those_of_single_texts(kind: str) -> None:
    config = type(CONFIGS[kind]).from_dict({**CONFIGS[kind].to_dict(), "num_labels": 1, "pad_token_id": 0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    init_head(model, seed=1)
    assert head_of(model).out_features == 1
    rows = FORESTS["K = 1 to 4, one beginning"]
    with torch.no_grad():
        expected = [
            float(model(torch.tensor([[*member.prompt_ids, *branch]])).logits[0, 0])
            for member in rows
            for branch in member.response_ids
        ]
        assert supports_trees(model)
        for batch in (pack(rows), pad(rows, pad_id=0)):
            torch.testing.assert_close(scores(model, batch), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", ["prefix", "prompt"])
def test_virtual_tokens_stand_before_the_trees(kind: str, tokens: Any) -> None:
    model = make(CONFIGS[kind])
    assert supports_trees(model)
    fresh_tokens(model, tokens, list(ids(50, 3))).attach(model)
    for forest in ("K = 1 to 4, one beginning", "nothing shared"):
        with torch.no_grad():
            packed_N = token_logps(model, pack(FORESTS[forest])).token_logp_N
            padded_N = token_logps(model, pad(FORESTS[forest], pad_id=0)).token_logp_N
            # At first they answer as if the same real tokens stood before every prompt.
            longer = [
                Tree(t.record_id, (*ids(50, 3), *t.prompt_ids), t.response_ids, (False, False, False, *t.prompt_counts))
                for t in FORESTS[forest]
            ]
            expected_N = one_by_one(make(CONFIGS[kind]), longer)
        torch.testing.assert_close(packed_N, padded_N, rtol=0, atol=1e-5)
        torch.testing.assert_close(packed_N, expected_N, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "mistral with a window"])
def test_generation_is_that_of_the_model_as_it_came(kind: str) -> None:
    prompts = torch.tensor([[0, 0, *ids(60, 7)], [*ids(61, 9)]])
    how = {"attention_mask": (prompts != 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain, model = make(CONFIGS[kind]), make(CONFIGS[kind])
    assert supports_trees(model)
    assert torch.equal(model.generate(prompts, **how), plain.generate(prompts, **how))


UNFIT: dict[str, tuple[PreTrainedConfig, str]] = {
    "bloom": (BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "cannot be replaced"),
    "falcon": (
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
                     eos_token_id=2),
        "cannot be replaced",
    ),
    "gpt_oss": (
        GptOssConfig(**SIZE, **HEADED, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW),
        "has no s_aux",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_that_cannot_falls_back_by_itself_and_says_so_once(kind: str) -> None:
    config, reason = UNFIT[kind]
    said: list[str] = []
    model = make(config)
    implementation = model.config._attn_implementation
    trees_of_models._VERDICTS.clear()
    assert not supports_trees(model, log=said.append)
    assert not supports_trees(make(config), log=said.append)
    assert len(said) == 1
    assert f"models of type '{kind}' get padded rows" in said[0]
    assert reason in said[0]
    assert model.config._attn_implementation == implementation
    rows = FORESTS["nothing shared"]
    with torch.no_grad():
        padded_N = token_logps(model, pad(rows, pad_id=0)).token_logp_N
        torch.testing.assert_close(padded_N, one_by_one(model, rows), rtol=0, atol=1e-5)


def test_the_trial_sees_a_model_that_looks_at_other_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that loses the trees on the way to its layers is found out by its figures."""
    model = make(LlamaConfig(**SIZE, **GROUPED, rms_norm_eps=1e-5))
    whole = model.base_model.forward

    def forgetful(*args: Any, tree_masks: Any = None, **kwargs: Any) -> Any:
        return whole(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", forgetful)
    said: list[str] = []
    assert not supports_trees(model, log=said.append)
    assert "packed and padded differ by" in said[0]
    trees_of_models._VERDICTS.clear()


def test_the_trial_leaves_weights_mode_and_dropout_as_they_were() -> None:
    model = make(CONFIGS["gpt2"]).train()
    model.base_model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trees_of_models._VERDICTS.clear()
    assert supports_trees(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_second_model_of_the_same_kind_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trees_of_models._VERDICTS.clear()
    assert supports_trees(make(CONFIGS["llama"]))
    runs: list[TreeBatch] = []
    monkeypatch.setattr(trees_of_models, "run_backbone", lambda model, batch: runs.append(batch))
    second = make(CONFIGS["llama"], seed=9)
    assert supports_trees(second)
    assert second.config._attn_implementation == TREE_ATTENTION
    assert runs == []


def test_logits_that_are_scaled_or_capped_are_known() -> None:
    for kind in ("llama", "granite", "cohere", "gpt2", "gemma2", "gemma3"):
        require_known_logits(make(CONFIGS[kind]))


def test_broken_weights_say_nothing_of_the_architecture() -> None:
    trees_of_models._VERDICTS.clear()
    broken = make(CONFIGS["llama"])
    with torch.no_grad():
        broken.base_model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    assert supports_trees(broken)
    assert trees_of_models._VERDICTS == {}


def test_bf16_models_pass_the_trial() -> None:
    for kind in ("llama", "gpt2", "gemma2"):
        assert supports_trees(make(CONFIGS[kind]).to(torch.bfloat16)), kind


def test_models_loaded_beside_a_packed_one_take_trees_by_themselves() -> None:
    rows = FORESTS["K = 1 to 4, one beginning"]
    model = make(CONFIGS["mistral with a window"])
    with torch.no_grad():
        expected_N = one_by_one(model, rows)
        assert hidden_states(model, pack(rows)).shape == (pack(rows).input_ids_BT.numel(), 32)
        torch.testing.assert_close(token_logps(model, pack(rows)).token_logp_N, expected_N, rtol=0, atol=1e-5)


def test_scoring_pads_for_a_model_that_cannot_and_a_packed_batch_is_refused() -> None:
    rows = FORESTS["nothing shared"]
    model = make(UNFIT["bloom"][0])
    found = response_logps(model, rows, Layout(is_packed=True, pad_id=0, tokens_per_batch=64))
    with torch.no_grad():
        expected_N = one_by_one(model, rows)
    expected_R = pad(rows, pad_id=0).sum_by_response(expected_N)
    assert [logp for row in rows for logp in found[row.record_id]] == pytest.approx(expected_R.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="'bloom' model takes padded rows"):
        hidden_states(model, pack(rows))
