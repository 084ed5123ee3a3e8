"""What the training core's tests share: toy rows, tiny models, checkpoints in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.heads import head_of, init_head, load_scalar_model
from pipeline_lib.models.sampling import SamplingSettings
from pipeline_lib.models.scoring import Layout, response_logps
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.models.tiny import byte_tokenizer, tiny_config
from pipeline_lib.schema import Message, Origin, Record, Response, Role
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.training.critic import Critic, Normalization
from pipeline_lib.training.group_settings import GrpoSettings, RlooSettings
from pipeline_lib.training.loop import LoopHooks, TrainingLoop
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.preferences import MISMATCHED, comparisons_of, judgement_of, mismatched
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.recipes.group import GroupRecipe
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.recipes.preference import PreferenceRecipe
from pipeline_lib.training.recipes.reward import Label, RewardRecipe
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.rollout import ValuedRollouts
from pipeline_lib.training.sampling_rollouts import GroupSampler, GroupScorer
from pipeline_lib.training.settings import OfflineSettings, OptimizerSettings, PpoSettings, TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel, prepare

torch.set_num_threads(1)  # models this small only lose by more, the more so on a busy machine

ORIGIN = Origin(source="toy", place="toy.jsonl", line=7)
LORA = LoraSettings(rank=4, alpha=8)


def byte_ids(text: str) -> list[int]:
    """The ids of the byte tokenizer, worked out by hand: printable bytes in order, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    place = {byte: 3 + index for index, byte in enumerate([*printable, *others])}
    return [place[byte] for byte in text.encode()]


def chat() -> ChatTokenizer:
    """The tiny model's tokenizer and template."""
    return ChatTokenizer.of(byte_tokenizer())


def encoder(*, max_prompt_tokens: int = 256, max_response_tokens: int = 64) -> Encoder:
    """An encoder of the tiny model."""
    return Encoder(chat(), max_prompt_tokens, max_response_tokens)


def dialogue(*turns: str) -> tuple[Message, ...]:
    """User, assistant, user, ... turns."""
    roles: tuple[Role, Role] = ("user", "assistant")
    return tuple(Message(role=roles[n % 2], content=turn) for n, turn in enumerate(turns))


def record(prompt: str | tuple[Message, ...], *responses: str, ranks: tuple[int, ...] | None = None) -> Record:
    """A row; responses of a comparison are ranked in their order unless ranks are given."""
    messages = dialogue(prompt) if isinstance(prompt, str) else prompt
    if ranks is None:
        ranks = tuple(range(1, len(responses) + 1)) if len(responses) > 1 else ()
    return Record.create(messages, tuple(Response(content=text) for text in responses), ranks, origin=ORIGIN)


def short_tree(name: str, prompt: list[int], *responses: list[int]) -> Tree:
    """A tree of bare ids, nothing of the prompt counted."""
    return Tree(name, tuple(prompt), tuple(tuple(ids) for ids in responses), (False,) * len(prompt))


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, sharpness: float = 1.0) -> PreTrainedModel:
    """A tiny Llama in memory; a sharpness above 1 makes its distributions uneven."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(len(byte_tokenizer()))).to(dtype)
    sharpen(model, sharpness)
    return model.eval()


def sharpen(model: PreTrainedModel, factor: float) -> None:
    """Multiply every matrix of the backbone, so that tokens depend on one another."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(factor)


def settings(**changes: Any) -> OfflineSettings:
    """Settings of a training of seconds: fp32, small adapters, a constant learning rate."""
    optimizer = {"learning_rate": 1e-3, "schedule": "constant", "warmup_frac": 0.0}
    optimizer.update(changes.pop("optimizer", {}))
    values: dict[str, Any] = {
        "batch_size": 4, "precision": "fp32", "adapter": LORA, "seed": 3, "max_prompt_tokens": 256,
        "max_response_tokens": 64,
    }  # fmt: skip
    return OfflineSettings(optimizer=OptimizerSettings(**optimizer), **(values | changes))


def policy_of(directory: Path, chosen: TrainingSettings) -> TrainedModel:
    """The tiny policy of a folder, ready for training."""
    model = load_causal_model(directory, dtype=torch.float32)
    return prepare(model, directory, chosen, seed=chosen.seed)


def reward_model_of(directory: Path, chosen: OfflineSettings) -> TrainedModel:
    """A tiny reward model on the folder's backbone, ready for training, as the stage makes it."""
    model = load_scalar_model(directory, dtype=torch.float32)
    init_head(model, seed=1)
    trained = prepare(model, directory, chosen, seed=chosen.seed)
    head_of(trained.model).requires_grad_(requires_grad=True)
    return trained


def write_reward_model(base: Path, directory: Path) -> Path:
    """Write a reward model on a folder's backbone, with its random head fixed."""
    model = load_scalar_model(base, dtype=torch.float32)
    init_head(model, seed=1)
    model.save_pretrained(directory)
    return directory


def ppo_settings(**changes: Any) -> PpoSettings:
    """Settings of a PPO of seconds."""
    shared = settings().model_dump(include=set(TrainingSettings.model_fields))
    values = shared | {
        "batch_size": 6, "iterations": 2, "minibatches": 2, "ppo_epochs": 2, "max_new_tokens": 8,
        "optimizer": OptimizerSettings(learning_rate=1e-3, schedule="constant", warmup_frac=0.0),
    }  # fmt: skip
    return PpoSettings.model_validate(values | changes)


PPO_PROMPTS = [encoder().tree(record(text)) for text in ("a", "what?", "tell me", "why", "hello you", "x", "and", "?")]


def ppo_recipe(directory: Path, reward_directory: Path, chosen: PpoSettings, *, world: World, **how: Any) -> PpoRecipe:
    """PPO from the tiny policy of a folder against a reward model, without normalisation."""
    further = {name: how.pop(name) for name in ("heldout", "scorer", "pretraining", "on_speed") if name in how}
    prompts = how.pop("prompts", PPO_PROMPTS)
    policy = policy_of(directory, chosen)
    normalization = Normalization(gain=2.0, bias=0.5)
    critic = Critic(
        reward_directory, chosen, normalization, seed=chosen.seed + 1, value_init=chosen.value_init
    )  # fmt: skip
    return PpoRecipe(
        policy, Reference.of(policy), critic, prompts, settings=chosen, layout=layout(**how), chat=chat(),
        should_stop=lambda: world.should_stop(), on_text=world.texts.append, **further,
    )  # fmt: skip


GROUP_METHODS: dict[str, type[RlooSettings | GrpoSettings]] = {"rloo": RlooSettings, "grpo": GrpoSettings}


def group_settings(method: str, **changes: Any) -> RlooSettings | GrpoSettings:
    """Settings of an RLOO or GRPO of seconds: four steps an iteration, three samples of each of four prompts."""
    shared = settings().model_dump(include=set(TrainingSettings.model_fields))
    optimizer = {"learning_rate": 1e-3, "schedule": "constant", "warmup_frac": 0.0}
    optimizer |= dict(changes.pop("optimizer", {}))
    values = shared | {
        "batch_size": 4, "iterations": 2, "samples_per_prompt": 3, "minibatches": 2, "mu": 2, "max_new_tokens": 6,
        "missing_eos": "keep", "optimizer": OptimizerSettings(**optimizer),
    }  # fmt: skip
    return GROUP_METHODS[method].model_validate(values | changes)


def group_recipe(
    directory: Path, chosen: RlooSettings | GrpoSettings, scorer: GroupScorer, *, world: World, **how: Any
) -> GroupRecipe:
    """RLOO or GRPO from the tiny policy of a folder against whatever gives scores."""
    further = {name: how.pop(name) for name in ("heldout", "min_prompts", "policy") if name in how}
    policy = further.pop("policy", None) or policy_of(directory, chosen)
    sampler = GroupSampler(
        policy, Reference.of(policy), scorer, layout(**how), chat(),
        SamplingSettings(max_new_tokens=chosen.max_new_tokens, temperature=chosen.temperature, batch_size=5),
        chosen.samples_per_prompt, should_stop=lambda: world.should_stop(), on_text=world.texts.append,
        generator_spec=chosen.generator, **further,
    )  # fmt: skip
    return GroupRecipe(sampler, PPO_PROMPTS, settings=chosen, layout=layout(**how))


def of_one_iteration(recipe: PpoRecipe) -> ValuedRollouts:
    """What PPO samples and measures in its first iteration."""
    recipe.micro_batches(0)
    assert recipe.rollouts is not None
    return recipe.rollouts


def layout(*, tokens_per_batch: int = 4096, is_packed: bool = True) -> Layout:
    """A layout for the tiny model."""
    return Layout(is_packed, chat().pad_id, tokens_per_batch)


@dataclass
class FolderCheckpoints:
    """Checkpoints in a local folder, with the methods of the real store."""

    folder: Path
    steps: list[int] = field(default_factory=list)
    """Every step saved, in order."""

    def save(self, step: int, directory: Path, note: Mapping[str, Any]) -> None:
        """Keep a copy of the directory."""
        shutil.copytree(directory, self.folder / str(step), dirs_exist_ok=True)
        self.steps.append(step)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest step."""
        return (max(self.steps), {}) if self.steps else None

    def fetch(self, step: int, directory: Path) -> Path:
        """A copy of a step's files."""
        shutil.copytree(self.folder / str(step), directory, dirs_exist_ok=True)
        return directory


@dataclass
class World:
    """Everything around a loop, and what it was told."""

    workdir: Path
    checkpoints: FolderCheckpoints
    should_stop: Callable[[], bool] = lambda: False
    told: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, workdir: Path) -> World:
        """A world in an empty folder."""
        return cls(workdir / "work", FolderCheckpoints(workdir / "kept"))

    def loop(
        self, recipe: Recipe, chosen: TrainingSettings, *, every_s: float = 1e9, is_sharded: bool = False
    ) -> TrainingLoop:
        """A loop over a recipe in this world."""
        hooks = LoopHooks(
            on_step=lambda step, figures: self.told.append((step, dict(figures))),
            on_progress=lambda _, text: self.texts.append(text),
            should_stop=lambda: self.should_stop(),
        )
        return TrainingLoop(
            recipe, chosen, workdir=self.workdir, checkpoints=self.checkpoints,
            checkpoint_every_s=every_s, hooks=hooks, is_sharded=is_sharded,
        )  # fmt: skip


def stop_before(step: int, loop: TrainingLoop) -> Callable[[], bool]:
    """An answer to `should_stop` that lets the steps before one run."""
    return lambda: loop.progress.step >= step


def weights_of(recipe: Recipe) -> dict[str, Tensor]:
    """Everything that a recipe trains, copied."""
    return {
        f"{group.name}/{name}": parameter.detach().clone()
        for group in recipe.parameter_groups()
        for name, parameter in group.parameters.items()
    }


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


ANSWERS = ["a", "bb, and more", "c", "dddd", "e e e e e e e", "f", "gg", "hhh hhh hhh"]
DEMONSTRATIONS = [encoder().tree(record(f"question {n}", text)) for n, text in enumerate(ANSWERS)]
COMPARISONS = [record(f"question {n}", text, text[::-1] + "?", "no") for n, text in enumerate(ANSWERS)]
PAIR_ROWS = [record(f"question {n}", text, "no" * (n + 1)) for n, text in enumerate(ANSWERS)]
PAIRS = [encoder().tree(row) for row in PAIR_ROWS]
JUDGED = {row.id: judgement_of(row) for row in PAIR_ROWS}
"""What is known of the pairs: the first response is the better one."""


def sft_recipe(directory: Path, chosen: OfflineSettings, **how: Any) -> SftRecipe:
    """SFT on the demonstrations."""
    return SftRecipe(policy_of(directory, chosen), DataPlan.of(DEMONSTRATIONS, chosen), layout(**how))


def reward_recipe(directory: Path, chosen: OfflineSettings, **how: Any) -> RewardRecipe:
    """A reward model on the comparisons, some with ties."""
    trees = [encoder().tree(row) for row in COMPARISONS]
    labels = {row.id: Label((1, 2, 2) if n % 2 else (1, 2, 3)) for n, row in enumerate(COMPARISONS)}
    objective = REWARD_LOSSES.build({"name": "bradley_terry", "centring": 0.01})
    return RewardRecipe(
        reward_model_of(directory, chosen), DataPlan.of(trees, chosen), layout(**how),
        objective=objective, labels=labels,
    )  # fmt: skip


def dpo_recipe(directory: Path, chosen: OfflineSettings, **how: Any) -> PreferenceRecipe:
    """DPO on the pairs, against the policy as it starts."""
    return preference_recipe(directory, chosen, {"name": "dpo", "beta": 0.5}, PAIR_ROWS, **how)


def preference_recipe(
    directory: Path, chosen: OfflineSettings, loss: dict[str, Any], rows: Sequence[Record] = COMPARISONS, **how: Any
) -> PreferenceRecipe:
    """Any preference loss on rows, against the policy as it starts."""
    limits = {key: how.pop(key) for key in ("max_prompt_tokens", "max_response_tokens") if key in how}
    objective = PREFERENCE_LOSSES.build(loss)
    policy = policy_of(directory, chosen)
    compared = comparisons_of(rows, encoder(**limits))
    others = mismatched(compared.trees)
    logps = response_logps(policy.model, [*compared.trees, *others], layout())
    return PreferenceRecipe(
        policy, DataPlan.of(compared.trees, chosen), layout(**how), objective=objective,
        judgements=compared.judgements,
        reference={name: tuple(row) for name, row in logps.items()} if objective.needs_reference else None,
        mismatched={tree.record_id.removeprefix(MISMATCHED): tree for tree in others},
        reference_model=Reference.of(policy) if objective.needs_target_kl else None,
    )  # fmt: skip


RECIPES: dict[str, Callable[..., Recipe]] = {"sft": sft_recipe, "reward": reward_recipe, "dpo": dpo_recipe}
"""The offline recipes on the rows above, by name."""
