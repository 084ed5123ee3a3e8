"""The task of `ppo_learns`: a toy language, a small model that speaks it, and a rule with a known best score.

The model (about 340 000 weights) is trained on random sentences first, so that it is a policy with a
prior as any SFT model is. The rule wants three given words, twelve words in all, and a full stop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.heads import init_head, load_scalar_model
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import Layout, response_logps
from pipeline_lib.schema import Message, Origin, Record, Response
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.training.collection import Scored
from pipeline_lib.training.loop import LoopHooks, TrainingLoop
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.rewards.contract import Resources, RewardSource, Sample
from pipeline_lib.training.rewards.ends_with import EndsWith
from pipeline_lib.training.rewards.length import Length
from pipeline_lib.training.rewards.words import Words
from pipeline_lib.training.sampling_rollouts import group_tree, prompt_trees
from pipeline_lib.training.settings import OfflineSettings, OptimizerSettings, TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel, prepare

NOUNS = ("river", "stone", "bird", "cloud", "fish", "tree", "hill", "star", "road", "wolf", "lamp", "boat")
ADJECTIVES = ("silver", "old", "quiet", "red", "tall", "cold", "bright", "small", "wild", "green")
VERBS = ("sings", "sleeps", "falls", "waits", "turns", "burns", "hides", "moves", "dreams", "stays")
OTHERS = ("the", "near", "and", "tell", "me", "about", ".", "!")
CONTROL = ("<pad>", "<user>", "<reply>", "<end>", "<unknown>")
TEMPLATE = (
    "{% for message in messages %}{{ ('<user> ' if message['role'] == 'user' else '<reply> ') + message['content'] }}"
    "{{ ' ' if message['role'] == 'user' else '<end>' }}{% endfor %}{% if add_generation_prompt %}<reply> {% endif %}"
)
MAX_NEW_TOKENS = 24
RESPONSES_PER_TREE = 16
"""Samples of a prompt that are measured in one tree: attention's cost grows with the square of its tokens."""
BEST_SCORE = 1.0
RULES: Mapping[str, RewardSource] = {
    "words": Words(words=("silver", "river", "sings")),
    "length": Length(target=12, tolerance=1, unit="words"),
    "full_stop": EndsWith(endings=(".",), only_finished=True),
}
"""Each is at most 1; the score is their mean."""
_ORIGIN = Origin(source="toy", place="toy", line=1)


def chat_tokenizer() -> ChatTokenizer:
    """Return the tokenizer of the toy language: one token a word."""
    words = [*CONTROL, *OTHERS, *NOUNS, *ADJECTIVES, *VERBS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=CONTROL[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(CONTROL))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )
    wrapped.chat_template = TEMPLATE
    return ChatTokenizer.of(wrapped)


def sentence(noun: str, draw: random.Random) -> str:
    """Return one to three clauses; about six in ten end with a full stop."""
    clauses = []
    for place in range(draw.choice((1, 1, 2, 2, 3))):
        subject = noun if place == 0 else draw.choice(NOUNS)
        clause = f"the {draw.choice(ADJECTIVES)} {subject} {draw.choice(VERBS)}"
        if draw.random() < 0.5:
            clause += f" near the {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"
        clauses.append(clause)
    return " and ".join(clauses) + draw.choice((" .", " .", " .", " !", ""))


def rows(count: int, *, seed: int) -> list[Record]:
    """Return demonstrations of the toy language."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        noun = draw.choice(NOUNS)
        prompt = (Message(role="user", content=f"tell me about the {noun}"),)
        found.append(Record.create(prompt, (Response(content=sentence(noun, draw)),), origin=_ORIGIN))
    return list({record.id: record for record in found}.values())


class NoCheckpoints:
    """A place for checkpoints that keeps none."""

    def save(self, step: int, directory: Path, note: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def latest(self) -> None:
        """Have nothing."""

    def fetch(self, step: int, directory: Path) -> Path:  # noqa: ARG002
        """Have nothing to fetch."""
        raise AssertionError(f"no checkpoint of step {step} was ever kept")


def train(
    recipe: Recipe, settings: TrainingSettings, workdir: Path, *, on_step: Callable[[int], None] = lambda _: None
) -> list[dict[str, float]]:
    """Run the real loop over a recipe; return its figures.

    Args:
        recipe: What is trained.
        settings: Its settings.
        workdir: For files of the loop.
        on_step: Called with each step, counted from 0, once it is made.
    """
    hooks = LoopHooks(on_step=lambda step, _: on_step(step), on_progress=lambda *_: None, should_stop=lambda: False)
    loop = TrainingLoop(
        recipe, settings, workdir=workdir, checkpoints=NoCheckpoints(), checkpoint_every_s=1e9, hooks=hooks
    )
    return loop.run()


@dataclass(frozen=True)
class Rule:
    """The rule as a reward, for recipes that ask about one response a tree and for those with several."""

    chat: ChatTokenizer

    def score(self, prompts: Sequence[Tree], responses: Sequence[Tree], is_finished: Sequence[bool]) -> Scored:  # noqa: ARG002
        """Score trees of one response (`collection.ResponseScorer`)."""
        return Scored(self.of(responses, is_finished)[0])

    def of(self, trees: Sequence[Tree], is_finished: Sequence[bool]) -> tuple[Tensor, dict[str, float]]:
        """Return the score of every response of some trees, and the mean of each part."""
        flat = [(tree, ids) for tree in trees for ids in tree.response_ids]
        samples = [
            Sample(tree.record_id, (), self.chat.decode(list(ids)), group_tree(0, tree.prompt_ids, [ids]), finished)
            for (tree, ids), finished in zip(flat, is_finished, strict=True)
        ]
        parts = {name: torch.tensor(rule.score(samples, Resources())) for name, rule in RULES.items()}
        return torch.stack(list(parts.values())).mean(0), {name: float(value.mean()) for name, value in parts.items()}


@dataclass(frozen=True)
class GroupRule:
    """The same for `sampling_rollouts.GroupScorer`."""

    rule: Rule

    def score(self, prompts: Sequence[Tree], samples: Sequence[Tree], is_finished: Sequence[bool]) -> Tensor:  # noqa: ARG002
        """Score every response of groups."""
        return self.rule.of(samples, is_finished)[0]


@dataclass(frozen=True)
class Task:
    """A speaker of the toy language as a model folder, its prompts, and the rule."""

    directory: Path
    critic_directory: Path
    chat: ChatTokenizer
    prompts: tuple[Tree, ...]
    layout: Layout
    rule: Rule

    def policy(self, settings: TrainingSettings) -> TrainedModel:
        """Load the speaker for training."""
        model = load_causal_model(self.directory, dtype=torch.float32)
        return prepare(model, self.directory, settings, seed=settings.seed)

    def speaker(self) -> PreTrainedModel:
        """Load the speaker as it was before any training on the rule."""
        model: PreTrainedModel = load_causal_model(self.directory, dtype=torch.float32)
        return model


def make_task(folder: Path, *, seed: int) -> Task:
    """Train a speaker of the toy language and write it as a model folder.

    Args:
        folder: Empty folder for model files.
        seed: Of weights and rows.
    """
    chat = chat_tokenizer()
    encoder = Encoder(chat, 32, MAX_NEW_TOKENS)
    directory, critic_directory = folder / "speaker", folder / "critic"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=chat.pad_id, eos_token_id=chat.eos_id, bos_token_id=None,
    )  # fmt: skip
    first = folder / "random"
    LlamaForCausalLM(config).save_pretrained(first)
    chat.tokenizer.save_pretrained(first)
    settings = OfflineSettings(
        batch_size=64, tokens_per_batch=512, epochs=8, max_steps=150, adapter=None, precision="fp32", seed=seed,
        optimizer=OptimizerSettings(learning_rate=3e-3, warmup_frac=0.05),
    )  # fmt: skip
    trained = prepare(load_causal_model(first, dtype=torch.float32), first, settings, seed=seed)
    layout = Layout(trained.is_packed, chat.pad_id, settings.tokens_per_batch)
    demonstrations = rows(2000, seed=seed)
    plan = DataPlan.of([encoder.tree(row) for row in demonstrations], settings)
    train(SftRecipe(trained, plan, layout), settings, folder)
    trained.save(directory)
    scalar = load_scalar_model(directory, dtype=torch.float32)
    init_head(scalar, seed=seed)  # PPO's value function starts at 0 and never asks this head
    scalar.save_pretrained(critic_directory)
    prompts = tuple(prompt_trees(encoder, demonstrations))
    return Task(directory, critic_directory, chat, prompts, layout, Rule(chat))


@dataclass(frozen=True)
class Drawn:
    """Fresh samples of every prompt, as many of each, prompt by prompt."""

    trees: tuple[Tree, ...]
    scores: Tensor
    """One a response, `(R,)`."""
    parts: dict[str, float]
    """Mean of each rule."""

    def logps(self, model: PreTrainedModel, task: Task) -> Tensor:
        """Return the log-probability of every response, `(R,)`, float64, nats."""
        found = response_logps(model, self.trees, task.layout)
        return torch.tensor([logp for tree in self.trees for logp in found[tree.record_id]], dtype=torch.float64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(len(ids) for tree in self.trees for ids in tree.response_ids)


def draw(task: Task, model: PreTrainedModel, *, samples: int, seed: int) -> Drawn:
    """Sample at temperature 1 and score.

    Args:
        task: The task.
        model: What speaks.
        samples: Samples of each prompt.
        seed: Of the samples.
    """
    settings = SamplingSettings(max_new_tokens=MAX_NEW_TOKENS, batch_size=256)
    drawn = sample(
        model, [tree.prompt_ids for tree in task.prompts], settings, eos_id=task.chat.eos_id,
        pad_id=task.chat.pad_id, seed=seed, samples_per_prompt=samples,
    )  # fmt: skip
    trees: list[Tree] = []
    for place, tree in enumerate(task.prompts):
        own = [one.ids for one in drawn[place * samples : (place + 1) * samples]]
        for start in range(0, samples, RESPONSES_PER_TREE):
            trees.append(group_tree(len(trees), tree.prompt_ids, own[start : start + RESPONSES_PER_TREE]))
    score_R, parts = task.rule.of(trees, [one.is_finished for one in drawn])
    return Drawn(tuple(trees), score_R, parts)


@dataclass(frozen=True)
class Measured:
    """What fresh samples of a policy show."""

    score: float
    score_error: float
    """Standard error of the score."""
    parts: dict[str, float]
    kl_nats: float
    """Mean of log pi / pi_ref over the samples' responses."""
    kl_error: float
    response_tokens: float


def measure(task: Task, policy: TrainedModel, *, samples: int, seed: int) -> Measured:
    """Sample at temperature 1 and compare with the speaker that training began with.

    Args:
        task: The task.
        policy: The trained model.
        samples: Samples of each prompt.
        seed: Of the samples.
    """
    drawn = draw(task, policy.model, samples=samples, seed=seed)
    kl_R = drawn.logps(policy.model, task) - drawn.logps(task.speaker(), task)
    count = len(kl_R)
    return Measured(
        float(drawn.scores.mean()), float(drawn.scores.std()) / count**0.5, drawn.parts,
        float(kl_R.mean()), float(kl_R.std()) / count**0.5, drawn.num_tokens / count,
    )  # fmt: skip
