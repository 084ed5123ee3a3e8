"""Silent faults of signs, labels and what counts: planted and caught as in `test_silent_bugs.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.errors import DataError
from pipeline_lib.losses.policy import clipped_policy_loss
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import response_logps
from pipeline_lib.models.tiny import byte_tokenizer
from pipeline_lib.rl.kl import kl_estimate
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.text.pack import TreeBatch, pack, pad
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.ranking import RankedPairs
from pipeline_lib.training.recipes import ppo as ppo_module
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.rollout import ValuedRollouts, rollout_tree
from tests.toy import (
    DEMONSTRATIONS,
    World,
    byte_ids,
    dialogue,
    encoder,
    layout,
    policy_of,
    ppo_recipe,
    ppo_settings,
    preference_recipe,
    record,
    settings,
    short_tree,
    tiny_llama,
)

END = 2


# 3 ---------------------------------------------------------------------------------------------------


def check_reward_sign(directory: Path, reward_directory: Path, world: World) -> None:
    """One PPO step on two rollouts, one better: it must get likelier against the other."""
    chosen = ppo_settings(batch_size=2, minibatches=1, ppo_epochs=1, iterations=1, kl_coef=0.0, adapter=None)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    trees = (rollout_tree(0, byte_ids("q"), byte_ids("good")), rollout_tree(1, byte_ids("q"), byte_ids("evil")))

    def margin() -> float:
        with torch.no_grad():
            logp_R = pack(trees).sum_by_response(token_logps(recipe.policy.model, pack(trees)).token_logp_N)
        return float(logp_R[0] - logp_R[1])

    with torch.no_grad():
        logp_N = token_logps(recipe.policy.model, pack(trees)).token_logp_N
    zeros_N = torch.zeros(8)
    both = torch.tensor([True, True])
    recipe._collect = lambda iteration: ValuedRollouts(  # type: ignore[method-assign]
        trees, logp_N, logp_N, zeros_N, torch.tensor([1.0, -1.0]), both, value_N=zeros_N
    )
    before = margin()
    world.loop(recipe, chosen).run()
    assert margin() > before, "the reward's sign is flipped: the better rollout got less likely"


def check_kl_sign(directory: Path, reward_directory: Path, world: World) -> None:
    """Of two rollouts with one score, the one that left the reference further must be worth less."""
    chosen = ppo_settings(batch_size=2, minibatches=1, kl_coef=0.5, whiten_advantages=False)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    trees = tuple(rollout_tree(index, [5], [7, 8]) for index in range(2))
    zeros_N, both = torch.zeros(4), torch.tensor([True, True])
    rollouts = ValuedRollouts(
        trees, torch.tensor([-1.0, -1.0, -2.0, -2.0]), torch.full((4,), -3.0), zeros_N, torch.zeros(2), both,
        value_N=zeros_N,
    )  # fmt: skip
    recipe._finish_iteration(0, rollouts)
    recipe._estimate_advantages(rollouts, [0, 1])
    far, near = recipe._advantages[0].sum(), recipe._advantages[1].sum()
    assert far < near < 0, "the KL penalty's sign is flipped: leaving the reference pays"


def test_03_flipped_signs(
    directory: Path, reward_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float) -> Any:
        return clipped_policy_loss(new, old, -advantages, mask, clip_range=clip_range)

    def flipped_kl(policy: Tensor, ref: Tensor, *, estimator: Any) -> Tensor:
        return kl_estimate(ref, policy, estimator=estimator)

    check_reward_sign(directory, reward_directory, World.at(tmp_path / "good"))
    check_kl_sign(directory, reward_directory, World.at(tmp_path / "good"))
    monkeypatch.setattr(ppo_module, "clipped_policy_loss", flipped_loss)
    with pytest.raises(AssertionError, match="reward's sign is flipped"):
        check_reward_sign(directory, reward_directory, World.at(tmp_path / "bad"))
    monkeypatch.setattr(ppo_module, "kl_estimate", flipped_kl)
    with pytest.raises(AssertionError, match="KL penalty's sign is flipped"):
        check_kl_sign(directory, reward_directory, World.at(tmp_path / "bad"))


# 4 ---------------------------------------------------------------------------------------------------


GOLDEN = [record(f"golden {n}", "no, bad", "yes, good", "so so", ranks=(3, 1, 2)) for n in range(6)]
BETTER_THAN = {("yes, good", "no, bad"), ("yes, good", "so so"), ("so so", "no, bad")}


def check_labels(directory: Path, world: World) -> None:
    """Pairs of known rows, trained on: each must come to prefer what people preferred."""
    chosen = settings(batch_size=3, epochs=6)
    recipe = preference_recipe(directory, chosen, {"name": "dpo", "beta": 0.5}, GOLDEN)
    policy = recipe.policy
    world.loop(recipe, chosen).run()
    texts = {text: encoder().response(text, where="golden") for pair in BETTER_THAN for text in pair}
    agreed = 0
    for n, (better, worse) in enumerate(sorted(BETTER_THAN) * 2):
        prompt = encoder().tree(GOLDEN[n % 6]).prompt_ids
        tree = short_tree(str(n), list(prompt), texts[better], texts[worse])
        margin = [response_logps(model, [tree], layout())[str(n)] for model in (policy.model, tiny_llama_of(directory))]
        agreed += margin[0][0] - margin[1][0] > margin[0][1] - margin[1][1]
    assert agreed == 6, f"chosen and rejected are swapped: {agreed} of 6 golden pairs agree"


def tiny_llama_of(directory: Path) -> PreTrainedModel:
    return load_causal_model(directory, dtype=torch.float32)


def test_04_swapped_columns(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_labels(directory, World.at(tmp_path / "good"))

    def swapped(batch: Any, ranks: Any) -> RankedPairs:
        right = of(batch, ranks)
        return RankedPairs(right.worse_P, right.better_P)

    of = RankedPairs.of
    monkeypatch.setattr(RankedPairs, "of", swapped)
    with pytest.raises(AssertionError, match="chosen and rejected are swapped: 0 of 6"):
        check_labels(directory, World.at(tmp_path / "bad"))


# 5 and 6 ---------------------------------------------------------------------------------------------


CHATS = [("hi",), ("hi", "yo", "k"), ("",), ("one\ntwo",), ("a", "b", "c", "d", "e")]


def greedy_tokenizer(single: str) -> ChatTokenizer:
    """A tokenizer that adds control tokens of its own to every text, as many do."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return ChatTokenizer.of(tokenizer)


def adding_special_tokens(self: ChatTokenizer, text: str) -> list[int]:
    """The planted fault: tokenise with the tokenizer's own additions."""
    return list(self.tokenizer(text)["input_ids"])


def check_one_bos(made: Encoder) -> None:
    for turns in CHATS:
        ids = made.tree(record(dialogue(*turns), "fine")).prompt_ids
        assert ids == tuple(golden_prompt(turns)), f"double BOS or other ids than the golden ones: {ids[:3]}"


def golden_prompt(turns: Sequence[str]) -> list[int]:
    ids: list[int] = []
    for n, turn in enumerate(turns):
        ids += [1, *byte_ids(f"{'assistant' if n % 2 else 'user'}\n{turn}"), END, *byte_ids("\n")]
    return [*ids, 1, *byte_ids("assistant\n")]


def check_one_eos(made: Encoder) -> None:
    for text in ("fine", "", "two\nlines"):
        (ids,) = made.tree(record("hi", text)).response_ids
        assert ids.count(END) == 1, f"a response has {ids.count(END)} end-of-turn tokens"
        assert ids[-1] == END


def test_05_double_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Encoder(greedy_tokenizer("<|im_start|> $A"), 512, 64)
    check_one_bos(made)
    monkeypatch.setattr(ChatTokenizer, "ids", adding_special_tokens)
    with pytest.raises(AssertionError, match="double BOS"):
        check_one_bos(made)


def test_06_double_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Encoder(greedy_tokenizer("$A <|im_end|>"), 512, 64)
    check_one_eos(made)
    monkeypatch.setattr(ChatTokenizer, "ids", adding_special_tokens)
    with pytest.raises(AssertionError, match="has 2 end-of-turn tokens"):
        check_one_eos(made)


# 7 ---------------------------------------------------------------------------------------------------


class MaskingPads(SftRecipe):
    """The planted fault: labels that equal the pad id do not count."""

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        kept = []
        for batch in super().micro_batches(step):
            real = batch.label_N != self.layout.pad_id
            kept.append(
                replace(
                    batch, source_N=batch.source_N[real], label_N=batch.label_N[real], response_N=batch.response_N[real]
                )
            )
        return kept


def check_stops(recipe_class: type[SftRecipe], directory: Path, world: World) -> None:
    """Train on short answers with pad = EOS: the model must learn to end its turn."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    chat = ChatTokenizer.of(tokenizer)
    assert chat.pad_id == chat.eos_id
    trees = [Encoder(chat, 256, 64).tree(record(f"question {n}", "ok")) for n in range(8)]
    chosen = settings(batch_size=8, epochs=15, adapter=None, optimizer={"learning_rate": 1e-2})
    policy = policy_of(directory, chosen)
    pad_layout = replace(layout(is_packed=False), pad_id=chat.pad_id)
    world.loop(recipe_class(policy, DataPlan.of(trees, chosen), pad_layout), chosen).run()
    found = sample(
        policy.model, [tree.prompt_ids for tree in trees], SamplingSettings(max_new_tokens=12, temperature=0),
        eos_id=END, pad_id=chat.pad_id, seed=0,
    )  # fmt: skip
    finished = sum(row.is_finished for row in found) / len(found)
    assert finished >= 0.9, f"the model never learnt to stop: {finished:.0%} of greedy samples end"


def test_07_pad_equals_eos(directory: Path, tmp_path: Path) -> None:
    check_stops(SftRecipe, directory, World.at(tmp_path / "good"))
    with pytest.raises(AssertionError, match="never learnt to stop: 0%"):
        check_stops(MaskingPads, directory, World.at(tmp_path / "bad"))


# 13 --------------------------------------------------------------------------------------------------


def check_what_counts(lay_out: Callable[[Sequence[Tree]], TreeBatch], trees: Sequence[Tree]) -> None:
    """The counted tokens are those of the responses, each with the probability that a plain run gives it."""
    model = tiny_llama(seed=2, sharpness=8.0)
    batch = lay_out(trees)
    responses = sum(len(tree.response_ids[0]) for tree in trees)
    share = batch.num_counted / sum(tree.num_tokens for tree in trees)
    assert batch.num_counted == responses, f"{share:.0%} of tokens count: the loss is on the prompt, too"
    expected = []
    for tree in trees:
        whole = torch.tensor([[*tree.prompt_ids, *tree.response_ids[0]]])
        with torch.no_grad():
            logp_TV = torch.log_softmax(model(whole).logits[0], dim=-1)
        first = len(tree.prompt_ids)
        expected += [float(logp_TV[t - 1, whole[0, t]]) for t in range(first, whole.shape[1])]
    with torch.no_grad():
        found_N = token_logps(model, batch).token_logp_N
    apart = float((found_N - torch.tensor(expected)).abs().max())
    assert apart <= 1e-4, f"labels are off by one: log-probabilities differ by {apart:.1f} nats"


def test_13_the_loss_is_on_the_response_and_not_off_by_one() -> None:
    trees = DEMONSTRATIONS[:4]
    for lay_out in (pack, lambda rows: pad(rows, pad_id=0)):
        check_what_counts(lay_out, trees)

        def shifted(rows: Sequence[Tree], lay_out: Any = lay_out) -> TreeBatch:
            batch = lay_out(rows)
            return replace(batch, source_N=batch.source_N + 1)  # type: ignore[no-any-return]

        with pytest.raises(AssertionError, match="off by one"):
            check_what_counts(shifted, trees)

        def on_the_prompt(rows: Sequence[Tree], lay_out: Any = lay_out) -> TreeBatch:
            return lay_out([replace(tree, prompt_counts=(True,) * len(tree.prompt_ids)) for tree in rows])  # type: ignore[no-any-return]

        with pytest.raises(AssertionError, match="the loss is on the prompt"):
            check_what_counts(on_the_prompt, trees)


# 15 --------------------------------------------------------------------------------------------------


def test_15_truncation_does_not_eat_the_answer(directory: Path, world: World) -> None:
    rows = [record("long " * 100, f"the answer {n}") for n in range(4)]
    limited = encoder(max_prompt_tokens=32, max_response_tokens=16)
    for row in rows:
        tree = limited.tree(row)
        assert len(tree.prompt_ids) == 32
        assert len(tree.response_ids[0]) == 13

    def cut_at_the_end(tree: Tree) -> Tree:
        """The planted fault: prompt and response as one text, cut at its end."""
        left = max(0, 48 - len(tree.prompt_ids))
        return replace(tree, response_ids=(tree.response_ids[0][:left],))

    eaten = [cut_at_the_end(encoder(max_prompt_tokens=512).tree(row)) for row in rows]
    chosen = settings()
    recipe = SftRecipe(policy_of(directory, chosen), DataPlan.of([*DEMONSTRATIONS, *eaten], chosen), layout())
    with pytest.raises(DataError, match=r"a response has no token in [1-4] rows of a step: [0-9a-f]{12}"):
        world.loop(recipe, chosen).run()
