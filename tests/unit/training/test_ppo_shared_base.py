"""One base for policy, reference, reward models and value function: the same figures as with bases of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pipeline_lib.errors import IntegrityError, InterruptedRunError
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.heads import head_of, load_scalar_model, scores
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.settings import Ia3Settings, LoraSettings, QloraSettings, can_share
from pipeline_lib.models.shared_base import StoredAdapter, read_adapter, write_adapter
from pipeline_lib.text.pack import pack
from pipeline_lib.training.critic import REWARD, VALUE, Critic, FrozenRewardModel, Normalization
from pipeline_lib.training.recipes.ppo import PpoRecipe, is_valued
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.rollout import rollout_tree
from pipeline_lib.training.sampling_rollouts import RewardModelScorer
from pipeline_lib.training.settings import PpoSettings, TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel
from tests.toy import (
    GROUP_METHODS,
    LORA,
    PPO_PROMPTS,
    World,
    byte_ids,
    chat,
    furthest,
    group_recipe,
    group_settings,
    layout,
    policy_of,
    ppo_settings,
    reward_recipe,
    settings,
    stop_before,
    weights_of,
)

NORMALIZATION = Normalization(gain=2.0, bias=0.5)
BATCH = pack([rollout_tree(0, byte_ids("hello"), byte_ids("you")), rollout_tree(1, byte_ids("and"), byte_ids("then?"))])


@dataclass(frozen=True)
class Rewarded:
    """A reward model trained with an adapter: as it was trained, and merged."""

    stored: StoredAdapter
    merged: Path


@pytest.fixture(scope="module")
def rewarded(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Rewarded:
    return trained_reward_model(directory, tmp_path_factory.mktemp("rewarded"), seed=3)


@pytest.fixture(scope="module")
def further(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Rewarded:
    """A second reward model on the same base."""
    return trained_reward_model(directory, tmp_path_factory.mktemp("further"), seed=4)


def trained_reward_model(directory: Path, folder: Path, *, seed: int) -> Rewarded:
    chosen = settings(epochs=6, optimizer={"learning_rate": 1e-2}, seed=seed)
    recipe = reward_recipe(directory, chosen)
    World.at(folder).loop(recipe, chosen).run()
    trained = recipe.reward_model
    assert isinstance(trained.adapter, PeftModel)
    head_1D = head_of(trained.model).weight
    assert write_adapter(trained.adapter, LORA, head_1D, base_sha256={"x": "1"}, directory=folder / "adapter")
    trained.save(folder / "merged")
    stored = read_adapter(folder / "adapter")
    assert stored is not None
    return Rewarded(stored, folder / "merged")


def recipe_of(
    directory: Path,
    rewarded: Rewarded,
    chosen: PpoSettings,
    world: World,
    *,
    is_shared: bool = True,
    further: Rewarded | None = None,
) -> PpoRecipe:
    """PPO with its critic, and a held-out model, on the policy's base, or with merged ones beside it."""
    policy = policy_of(directory, chosen)
    how = {"seed": chosen.seed + 1, "value_init": chosen.value_init}
    critic = (
        Critic.on_policy(policy, rewarded.stored, NORMALIZATION, **how)  # type: ignore[arg-type]
        if is_shared
        else Critic(rewarded.merged, chosen, NORMALIZATION, **how)  # type: ignore[arg-type]
    )
    return PpoRecipe(
        policy, Reference.of(policy), critic, PPO_PROMPTS, settings=chosen, layout=layout(), chat=chat(),
        should_stop=lambda: world.should_stop(), on_text=world.texts.append,
        heldout=None if further is None else frozen(policy, further, chosen, is_shared=is_shared),
    )  # fmt: skip


def frozen(policy: TrainedModel, rewarded: Rewarded, chosen: TrainingSettings, *, is_shared: bool) -> FrozenRewardModel:
    """A reward model that only scores, on the policy's base or merged."""
    if is_shared:
        return FrozenRewardModel.on_policy(policy, rewarded.stored, NORMALIZATION)
    return FrozenRewardModel(rewarded.merged, NORMALIZATION, settings=chosen)


def plain(name: str) -> str:
    return name.replace(f".{VALUE}.", ".default.")


def test_the_note_tells_what_the_adapter_is(rewarded: Rewarded) -> None:
    note = rewarded.stored.note
    assert (note.settings.rank, note.settings.alpha, note.base_sha256) == (4, 8, {"x": "1"})
    assert note.settings.target_modules == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    )  # fmt: skip
    assert rewarded.stored.head_1D.shape[0] == 1
    assert "layers.0.self_attn.q_proj.A" in rewarded.stored.tensors


@torch.no_grad()
def test_all_four_say_what_models_of_their_own_say(directory: Path, rewarded: Rewarded, world: World) -> None:
    recipe = recipe_of(directory, rewarded, ppo_settings(), world)
    merged = load_scalar_model(rewarded.merged, dtype=torch.float32).eval()
    base = load_causal_model(directory, dtype=torch.float32)
    expected_R = scores(merged, BATCH)
    assert float((recipe.critic.raw_scores(BATCH) - expected_R).abs().max()) <= 1e-5
    assert float((recipe.critic.scores(BATCH) - (2.0 * expected_R + 0.5)).abs().max()) <= 2e-5
    bare_R = scores(load_scalar_model(directory, dtype=torch.float32).eval(), BATCH)
    assert float((expected_R - bare_R).abs().min()) > 1e-2, "a reward model that learnt nothing would prove nothing"
    assert BATCH.response_N.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    apart = Critic(rewarded.merged, ppo_settings(), NORMALIZATION, seed=9)
    assert float((recipe.critic.values(BATCH) - apart.values(BATCH)).abs().max()) <= 2e-5
    logp_N = token_logps(base, BATCH).token_logp_N
    with recipe.reference.active() as reference:
        assert torch.equal(token_logps(reference, BATCH).token_logp_N, logp_N)
    assert torch.equal(token_logps(recipe.policy.model, BATCH).token_logp_N, logp_N)


def test_only_the_adapters_of_policy_and_value_are_trained(directory: Path, rewarded: Rewarded, world: World) -> None:
    chosen = ppo_settings()
    recipe = recipe_of(directory, rewarded, chosen, world)
    policy, value = recipe.parameter_groups()
    assert all(".default." in name for name in policy.parameters)
    assert all(f".{VALUE}." in name for name in value.parameters if name != "value_head")
    assert len(value.parameters) == len(policy.parameters) + 1
    trained = {id(parameter) for group in (policy, value) for parameter in group.parameters.values()}
    assert len(trained) == len(policy.parameters) + len(value.parameters)
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in recipe.policy.model.named_parameters()
        if id(parameter) not in trained
    }
    assert sum(f".{REWARD}." in name for name in frozen) == len(policy.parameters)
    before = weights_of(recipe)
    scored, (ref_N, policy_N, value_N) = recipe.critic.raw_scores(BATCH), _said(recipe)
    world.loop(recipe, chosen).run()
    after = weights_of(recipe)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    now = dict(recipe.policy.model.named_parameters())
    assert all(torch.equal(now[name], kept) and not now[name].requires_grad for name, kept in frozen.items())
    assert torch.equal(recipe.critic.raw_scores(BATCH), scored)
    again = _said(recipe)
    assert torch.equal(again[0], ref_N)
    assert float((again[1] - policy_N).abs().max()) > 1e-4
    assert float((again[2] - value_N).abs().max()) > 1e-4


@torch.no_grad()
def _said(recipe: PpoRecipe) -> tuple[Tensor, Tensor, Tensor]:
    with recipe.reference.active() as reference:
        ref_N = token_logps(reference, BATCH).token_logp_N
    return ref_N, token_logps(recipe.policy.model, BATCH).token_logp_N, recipe.critic.values(BATCH)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("value_init", ["reward_model", "zero"])
def test_training_is_that_of_bases_of_their_own(
    is_checkpointed: bool, value_init: str, directory: Path, rewarded: Rewarded, tmp_path: Path
) -> None:
    chosen = ppo_settings(
        value_init=value_init, gradient_checkpointing=is_checkpointed,
        optimizer={"learning_rate": 1e-3, "epsilon": 1e-4, "schedule": "constant", "warmup_frac": 0.0},
    )  # fmt: skip
    found = []
    for is_shared in (True, False):
        world = World.at(tmp_path / str(is_shared))
        recipe = recipe_of(directory, rewarded, chosen, world, is_shared=is_shared)
        assert recipe.critic.is_on_policy is is_shared
        series = world.loop(recipe, chosen).run()
        found.append((weights_of(recipe), series))
    (shared, shared_series), (apart, apart_series) = found
    same = {plain(name): value for name, value in shared.items()}
    assert same.keys() == apart.keys()
    assert max(float((same[name] - apart[name]).abs().max()) for name in same) <= 2e-5
    for one, other in zip(shared_series, apart_series, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    directory: Path, rewarded: Rewarded, tmp_path: Path
) -> None:
    chosen = ppo_settings(iterations=2)
    whole = World.at(tmp_path / "whole")
    expected = recipe_of(directory, rewarded, chosen, whole)
    series = whole.loop(expected, chosen).run()
    for stops in ([1], [4], [2, 5, 7]):
        world = World.at(tmp_path / "-".join(map(str, stops)))
        for stop in stops:
            loop = world.loop(recipe_of(directory, rewarded, chosen, world), chosen)
            world.should_stop = stop_before(stop, loop)
            with pytest.raises(InterruptedRunError, match=f"before step {stop} of 8"):
                loop.run()
            world.should_stop = lambda: False
        recipe = recipe_of(directory, rewarded, chosen, world)
        assert world.loop(recipe, chosen).run() == series
        kept, found = weights_of(expected), weights_of(recipe)
        assert all(torch.equal(kept[name], found[name]) for name in kept)


def test_what_is_saved_is_the_policy_alone(directory: Path, rewarded: Rewarded, world: World, tmp_path: Path) -> None:
    chosen = ppo_settings(optimizer={"learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0})
    recipe = recipe_of(directory, rewarded, chosen, world)
    world.loop(recipe, chosen).run()
    with torch.no_grad():
        trained_N = token_logps(recipe.policy.model, BATCH).token_logp_N
        start_N = token_logps(load_causal_model(directory, dtype=torch.float32), BATCH).token_logp_N
    recipe.policy.save(tmp_path / "saved")
    saved = load_causal_model(tmp_path / "saved", dtype=torch.float32)
    assert not any("lora" in name for name in saved.state_dict())
    with torch.no_grad():
        saved_N = token_logps(saved, BATCH).token_logp_N
    assert float((saved_N - trained_N).abs().max()) <= 1e-4
    assert float((saved_N - start_N).abs().max()) > 1e-2


def test_each_forward_holds_one_models_activations(directory: Path, rewarded: Rewarded, world: World) -> None:
    recipe = recipe_of(directory, rewarded, ppo_settings(), world)
    batches = recipe.micro_batches(0)
    assert [is_valued(batch) for batch in batches] == [False, True]
    policy, value = recipe.parameter_groups()
    for batch, trained, silent in ((batches[0], policy, value), (batches[1], value, policy)):
        with recipe.training_forward(batch):
            recipe.loss(batch, batches).loss.backward()
        assert all(parameter.grad is not None for parameter in trained.parameters.values())
        assert all(parameter.grad is None for parameter in silent.parameters.values())
        for parameter in trained.parameters.values():
            parameter.grad = None


def test_an_adapter_of_another_shape_is_refused(directory: Path, rewarded: Rewarded) -> None:
    stored = StoredAdapter(
        rewarded.stored.note, {name: value[:, :3] for name, value in rewarded.stored.tensors.items()},
        rewarded.stored.head_1D,
    )  # fmt: skip
    with pytest.raises(IntegrityError, match="'reward_model' has 28 matrices that do not go on this model's 28"):
        Critic.on_policy(policy_of(directory, ppo_settings()), stored, NORMALIZATION, seed=0)


def test_which_adapters_share(tmp_path: Path) -> None:
    assert can_share(LoraSettings(use_rslora=True))
    for other in (None, LoraSettings(use_dora=True), QloraSettings(), Ia3Settings()):
        assert not can_share(other)
    assert read_adapter(tmp_path) is None


# Further reward models ---------------------------------------------------------------------------------


@torch.no_grad()
def test_further_reward_models_say_what_models_of_their_own_say(
    directory: Path, rewarded: Rewarded, further: Rewarded, world: World
) -> None:
    recipe = recipe_of(directory, rewarded, ppo_settings(), world, further=further)
    heldout = recipe.collector.heldout
    assert heldout is not None
    assert heldout.is_on_policy
    third = frozen(recipe.policy, rewarded, ppo_settings(), is_shared=True)
    main_R, further_R = (
        2.0 * scores(load_scalar_model(each.merged, dtype=torch.float32).eval(), BATCH) + 0.5
        for each in (rewarded, further)
    )
    assert float((main_R - further_R).abs().min()) > 1e-3, "two that say the same would prove nothing"
    for model, expected_R in ((heldout, further_R), (third, main_R), (recipe.critic, main_R)):
        assert float((model.scores(BATCH) - expected_R).abs().max()) <= 2e-5
        assert float((model.raw_scores(BATCH) - (expected_R - 0.5) / 2.0).abs().max()) <= 1e-5
    apart = frozen(recipe.policy, further, ppo_settings(), is_shared=False)
    assert not apart.is_on_policy
    assert float((heldout.scores(BATCH) - apart.scores(BATCH)).abs().max()) <= 2e-5
    # Policy and reference are as silent models leave them.
    logp_N = token_logps(load_causal_model(directory, dtype=torch.float32), BATCH).token_logp_N
    with recipe.reference.active() as reference:
        assert torch.equal(token_logps(reference, BATCH).token_logp_N, logp_N)
    assert torch.equal(token_logps(recipe.policy.model, BATCH).token_logp_N, logp_N)


def test_a_held_out_model_on_the_policys_base_changes_no_training(
    directory: Path, rewarded: Rewarded, further: Rewarded, tmp_path: Path
) -> None:
    chosen = ppo_settings()
    found = []
    for name, how in {"without": {}, "on it": {"further": further}}.items():
        world = World.at(tmp_path / name)
        recipe = recipe_of(directory, rewarded, chosen, world, **how)  # type: ignore[arg-type]
        series = world.loop(recipe, chosen).run()
        found.append((recipe, series))
    (alone, plain_series), (watched, series) = found
    assert all(torch.equal(value, weights_of(watched)[name]) for name, value in weights_of(alone).items())
    for one, other in zip(plain_series, series, strict=True):
        assert {name: value for name, value in other.items() if name != "heldout_score"} == one
    world = World.at(tmp_path / "apart")
    apart = recipe_of(directory, rewarded, chosen, world, further=further, is_shared=False)
    told = world.loop(apart, chosen).run()
    assert [row["heldout_score"] for row in series] == pytest.approx([row["heldout_score"] for row in told], abs=1e-4)
    # Its matrices are the trained model's still, and no parameter group has them.
    heldout = watched.collector.heldout
    assert heldout is not None
    now = dict(watched.policy.model.named_parameters())
    mine = [name for name in now if f".{REWARD}_3." in name]
    assert len(mine) == len(further.stored.tensors)
    trained = {id(value) for group in watched.parameter_groups() for value in group.parameters.values()}
    assert not any(id(now[name]) in trained or now[name].requires_grad for name in mine)
    fresh = recipe_of(directory, rewarded, chosen, World.at(tmp_path / "fresh"), further=further).policy.model
    kept = dict(fresh.named_parameters())
    assert all(torch.equal(now[name], kept[name]) for name in mine)


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_groups_are_scored_on_the_policys_base_too(
    method: str, directory: Path, rewarded: Rewarded, further: Rewarded, tmp_path: Path
) -> None:
    """Reward model and held-out one are adapters on it; the training is that of models of their own."""
    chosen = group_settings(method, optimizer={"epsilon": 1e-4})
    found = []
    for is_shared in (True, False):
        world = World.at(tmp_path / str(is_shared))
        policy = policy_of(directory, chosen)
        main, heldout = (frozen(policy, each, chosen, is_shared=is_shared) for each in (rewarded, further))
        recipe = group_recipe(
            directory, chosen, RewardModelScorer(main, layout()), world=world, policy=policy, heldout=heldout
        )
        series = world.loop(recipe, chosen).run()
        found.append((weights_of(recipe), series))
        policy.save(tmp_path / f"saved-{is_shared}")
    (shared, shared_series), (apart, apart_series) = found
    assert furthest(shared, apart) <= 2e-5
    for one, other in zip(shared_series, apart_series, strict=True):
        names = ("loss", "score", "heldout_score")
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=2e-5)
    saved = load_causal_model(tmp_path / "saved-True", dtype=torch.float32)
    assert not any("lora" in name for name in saved.state_dict()), "what is saved is the policy alone"
