"""Virtual tokens: as peft computes them, packed as padded, sampled as scored, saved and loaded, served."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline_lib.errors import ConfigError, IntegrityError
from pipeline_lib.models.adapters import add_adapter, without_adapter
from pipeline_lib.models.backbone import hidden_states
from pipeline_lib.models.base import load_causal_model, save_model
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.settings import AdapterSettings, LoraSettings, PrefixSettings, PromptSettings
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.models.virtual_tokens import FOLDER, Kind, VirtualTokens, fresh_tokens, virtual_tokens_of
from pipeline_lib.text.pack import TreeBatch, pack, pad
from tests.toy import byte_ids, sharpen, short_tree, tiny_llama

KINDS: list[Kind] = ["prefix", "prompt"]
NUM = 5
_SIZES = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama() -> PreTrainedModel:
    return tiny_llama(sharpness=3.0)


def _made(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    sharpen(model, 3.0)
    return model


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
    return _made(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=259, **sizes)))


def qwen2() -> PreTrainedModel:
    return _made(lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2)))


def gemma() -> PreTrainedModel:
    return _made(lambda: GemmaForCausalLM(GemmaConfig(**_SIZES, num_key_value_heads=1, head_dim=16)))


def neox() -> PreTrainedModel:
    return _made(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)))


ARCHITECTURES = [llama, qwen2, gemma, gpt2, neox]


def with_tokens(model: PreTrainedModel, kind: Kind) -> VirtualTokens:
    """Put trained tokens in front of a model: those of a text, moved by chance."""
    tokens = fresh_tokens(model, kind, byte_ids("hello")).attach(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        tokens.values.add_(torch.randn(tokens.values.shape, generator=generator) * 0.3)
    return tokens


TREES = [
    short_tree("a", byte_ids("system: one"), byte_ids("yes"), byte_ids("no, never")),
    short_tree("b", byte_ids("system: two questions"), byte_ids("a")),
    short_tree("c", byte_ids("system: three"), byte_ids("bb"), byte_ids("c"), byte_ids("dddd")),
]


def logps(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    with torch.no_grad():
        return token_logps(model, batch).token_logp_N


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", ARCHITECTURES)
def test_the_model_is_the_one_that_peft_makes_of_the_files(
    make: Callable[[], PreTrainedModel], kind: Kind, tmp_path: Path
) -> None:
    model = make()
    base = copy.deepcopy(model)
    with_tokens(model, kind).write(tmp_path)
    ids = torch.randint(3, 259, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    positions = torch.arange(9).expand(3, 9)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        theirs = PeftModel.from_pretrained(base, tmp_path)(input_ids=ids, attention_mask=mask).logits[:, -9:]
        bare = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    counts = mask.bool()
    torch.testing.assert_close(ours[counts], theirs[counts], rtol=0, atol=1e-6)
    assert float((ours - bare)[counts].abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [llama, qwen2, gemma])
def test_packed_is_padded_and_one_row_at_a_time(make: Callable[[], PreTrainedModel], kind: Kind) -> None:
    model = make()
    tokens = with_tokens(model, kind)
    packed, padded = pack(TREES), pad(TREES, pad_id=0)
    one_by_one = torch.cat([logps(model, pack([tree])) for tree in TREES])
    torch.testing.assert_close(logps(model, packed), logps(model, padded), rtol=0, atol=1e-5)
    torch.testing.assert_close(logps(model, packed), one_by_one, rtol=0, atol=1e-5)
    with tokens.switched_off():
        assert float((logps(model, packed) - one_by_one).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
def test_the_attention_tree_by_tree_sees_all_tokens(make: Callable[[], PreTrainedModel], kind: Kind) -> None:
    model = make()
    with_tokens(model, kind)
    expected = logps(model, pad(TREES, pad_id=0))
    assert supports_trees(model)
    torch.testing.assert_close(logps(model, pack(TREES)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logps(model, pack(TREES[:1])), expected[: 3 + 9], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logps_are_those_of_the_plain_logits(kind: Kind) -> None:
    model = llama()
    with_tokens(model, kind)
    tree = TREES[0]
    found = logps(model, pack(TREES[:1])).split([len(ids) for ids in tree.response_ids])
    for response, token_logp in zip(tree.response_ids, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*tree.prompt_ids, *response]])).logits[0]
        rows = torch.log_softmax(logits, -1)[len(tree.prompt_ids) - 1 : -1]
        expected = rows.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(token_logp, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hidden_states_are_those_of_the_real_tokens(kind: Kind) -> None:
    model = llama()
    with_tokens(model, kind)
    batch = pack(TREES)
    assert hidden_states(model, batch).shape[0] == batch.input_ids_BT.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_real_embeddings_is_the_text_itself(kind: Kind) -> None:
    model = llama()
    text, rest = byte_ids("hello"), byte_ids(" world?")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[*text, *rest]])).logits[:, len(text) :]
        fresh_tokens(model, kind, text).attach(model)
        found = model(input_ids=torch.tensor([rest])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [pack, lambda trees: pad(trees, pad_id=0)])
def test_the_gradient_is_that_of_finite_differences(kind: Kind, layout: Callable[..., TreeBatch]) -> None:
    model = gpt2().double()  # nothing in it is computed in less than float64
    tokens = with_tokens(model, kind).double()
    model.requires_grad_(requires_grad=False)
    tokens.begin_training(is_fresh=True)
    batch = layout(TREES)

    def loss() -> Tensor:
        return token_logps(model, batch).token_logp_N.sum()

    loss().backward()
    assert tokens.values.grad is not None
    gradient = tokens.values.grad.clone()
    direction = torch.randn(tokens.values.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        tokens.values.add_(direction * step)
        above = loss()
        tokens.values.sub_(direction * 2 * step)
        below = loss()
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-5, atol=1e-6)
    assert bool((gradient.abs().sum(1) > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_packed_and_padded(kind: Kind) -> None:
    gradients = []
    for batch in (pack(TREES), pad(TREES, pad_id=0)):
        model = llama()
        tokens = with_tokens(model, kind)
        tokens.begin_training(is_fresh=True)
        token_logps(model, batch).token_logp_N.sum().backward()
        assert tokens.values.grad is not None
        gradients.append(tokens.values.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_drawn_from_what_is_scored(kind: Kind) -> None:
    model = llama()
    with_tokens(model, kind)
    prompts = [byte_ids(text) for text in ("system: a", "system: longer one", "system: b?")]
    greedy = SamplingSettings(max_new_tokens=6, temperature=0.0, batch_size=2)
    drawn = sample(model, prompts, greedy, eos_id=2, pad_id=0, seed=0)
    for prompt, found in zip(prompts, drawn, strict=True):
        ids = list(prompt)
        for token in found.ids:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_loaded_with_its_tokens_and_the_base_as_it_was(
    kind: Kind, directory: Path, tmp_path: Path
) -> None:
    model = load_causal_model(directory, dtype=torch.float32)
    bare = logps(model, pack(TREES))
    with_tokens(model, kind)
    before = logps(model, pack(TREES))
    save_model(model, tmp_path, dtype=torch.float32, tokenizer_from=directory)
    loaded = load_causal_model(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logps(loaded, pack(TREES)), before, rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "virtual" in name)
    assert virtual_tokens_of(model) is None
    torch.testing.assert_close(logps(model, pack(TREES)), bare, rtol=0, atol=1e-6)
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_files_that_are_no_virtual_tokens_are_refused(directory: Path, tmp_path: Path) -> None:
    model = load_causal_model(directory, dtype=torch.float32)
    with_tokens(model, "prompt")
    save_model(model, tmp_path, dtype=torch.float32, tokenizer_from=directory)
    lora = add_adapter(load_causal_model(directory, dtype=torch.float32), LoraSettings(), seed=0, encode=byte_ids)
    assert isinstance(lora, PeftModel)
    lora.save_pretrained(str(tmp_path / FOLDER))
    with pytest.raises(IntegrityError, match="holds no virtual tokens"):
        load_causal_model(tmp_path, dtype=torch.float32)


def _fresh(chosen: AdapterSettings, *, seed: int = 0) -> tuple[PreTrainedModel, VirtualTokens]:
    model = llama()
    tokens = add_adapter(model, chosen, seed=seed, encode=byte_ids)
    assert isinstance(tokens, VirtualTokens)
    return model, tokens


@pytest.mark.parametrize(("chosen", "width"), [(PrefixSettings(num_tokens=3), 2 * 2 * 2 * 16), (PromptSettings(), 64)])
def test_only_the_tokens_train_and_there_are_as_many_as_the_papers_say(chosen: AdapterSettings, width: int) -> None:
    model, tokens = _fresh(chosen)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["model.virtual_tokens.values"]
    assert tokens.values.numel() == tokens.num_tokens * width  # prefix: 2 x layers x n x key width; prompt: n x D


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_the_model_is_the_one_without_tokens(kind: Kind) -> None:
    bare = logps(llama(), pack(TREES))
    model, tokens = _fresh(PrefixSettings(num_tokens=NUM) if kind == "prefix" else PromptSettings(num_tokens=NUM))
    assert float((logps(model, pack(TREES)) - bare).abs().max()) > 1e-2
    with without_adapter(tokens):
        torch.testing.assert_close(logps(model, pack(TREES)), bare, rtol=0, atol=0)


def test_they_start_as_a_text_or_as_drawn_by_the_seed() -> None:
    embedding = llama().get_input_embeddings().weight
    _, by_text = _fresh(PromptSettings(num_tokens=5, text="abc"))
    torch.testing.assert_close(by_text.values, embedding[byte_ids("abcab")])
    drawn = [_fresh(PromptSettings(num_tokens=5, init="random"), seed=seed)[1].values for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("chosen", [PrefixSettings(num_tokens=NUM), PromptSettings(num_tokens=NUM)])
def test_loaded_tokens_train_on_and_are_the_reference_when_switched_off(chosen: AdapterSettings) -> None:
    model, tokens = _fresh(chosen)
    start = logps(model, pack(TREES))
    again = add_adapter(model, chosen, seed=1, encode=byte_ids)
    assert again is tokens
    with torch.no_grad():
        tokens.values.add_(0.5)
    with without_adapter(again):
        torch.testing.assert_close(logps(model, pack(TREES)), start, rtol=0, atol=0)
    assert float((logps(model, pack(TREES)) - start).abs().max()) > 1e-3


def test_tokens_of_another_kind_or_number_cannot_be_added() -> None:
    model, _ = _fresh(PrefixSettings(num_tokens=3))
    for other in (PrefixSettings(num_tokens=4), PromptSettings(num_tokens=3)):
        with pytest.raises(ConfigError, match="already has 3 virtual tokens by prefix tuning"):
            add_adapter(model, other, seed=0, encode=byte_ids)


def test_lora_trains_behind_frozen_tokens() -> None:
    model, tokens = _fresh(PromptSettings(num_tokens=NUM))
    before = logps(model, pack(TREES))
    wrapper = add_adapter(model, LoraSettings(rank=2), seed=0, encode=byte_ids)
    torch.testing.assert_close(logps(model, pack(TREES)), before, rtol=0, atol=0)
    assert not tokens.values.requires_grad
    with without_adapter(wrapper):
        torch.testing.assert_close(logps(model, pack(TREES)), before, rtol=0, atol=0)


def test_models_that_go_round_their_backbone_are_refused() -> None:
    config = OPTConfig(
        vocab_size=259, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    )
    with pytest.raises(ConfigError, match="cannot be put in front of a 'opt' model"):
        add_adapter(OPTForCausalLM(config), PromptSettings(), seed=0, encode=byte_ids)


def test_a_prefix_needs_layers_that_see_everything() -> None:
    config = MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=8)
    with pytest.raises(ConfigError, match="layers that all see the whole text"):
        add_adapter(MistralForCausalLM(config), PrefixSettings(), seed=0, encode=byte_ids)
