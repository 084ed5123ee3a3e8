"""What `ppo_learns`' part about a language model starts from: an SFT model and two reward models, kept on disk.

The base model first learns answers (SFT): that is the start and the reference. Each reward model learns from
its own pairs to tell the good answer from the other one, which is the start's own where the rows have one answer.
Every piece is made once and kept with the time that it took, so that a run that was cut goes on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import Field

from benchmarks.learns_language_rows import Kind, Rows, Sizes, choose_rows
from benchmarks.learns_task import train
from pipeline_lib.generation.continuous import Continuous
from pipeline_lib.generation.contract import Policy
from pipeline_lib.hashing import derive_seed, sha256_json
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.losses.reward.normalization import normalization
from pipeline_lib.models.base import SMOLLM2, import_base_model, load_causal_model
from pipeline_lib.models.heads import head_of, init_head, load_scalar_model
from pipeline_lib.models.sampling import SamplingSettings
from pipeline_lib.models.scoring import Layout, response_scores
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.models.shared_base import StoredAdapter, read_adapter, write_adapter
from pipeline_lib.models.tiny import TINY_TEMPLATE
from pipeline_lib.schema import Record
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.training.critic import Normalization
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipes.reward import Label, RewardRecipe
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.sampling_rollouts import group_tree
from pipeline_lib.training.settings import OfflineSettings, OptimizerSettings
from pipeline_lib.training.trained_model import TrainedModel, prepare
from pipeline_lib.validation import Frozen

REWARD_MODELS = ("proxy", "heldout")
TOKENS_PER_BATCH = 1024
NOTE, TREES = "found.json", "trees.json"


class Preparation(Frozen):
    """What start and reward models are made from; they are kept under its sha256."""

    rules: int = 1
    """Raise when the same values would give other models."""
    base: str = SMOLLM2
    kind: Kind = "documentation"
    sizes: Sizes = Sizes()
    scale_samples: int = Field(64, ge=2)
    """The start's answers on which both reward models get mean 0 and deviation 1."""
    max_prompt_tokens: int = 64
    max_new_tokens: int = 32
    sft_learning_rate: float = 1e-3
    reward_learning_rate: float = 5e-4
    reward_epochs: int = 1
    seed: int = 0

    def settings(self, *, learning_rate: float, batch_size: int, epochs: int, seed: int) -> OfflineSettings:
        """Return the settings of a training on fixed rows."""
        return OfflineSettings(
            precision="fp32", tokens_per_batch=TOKENS_PER_BATCH, max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_new_tokens, batch_size=batch_size, epochs=epochs, seed=seed,
            optimizer=OptimizerSettings(learning_rate=learning_rate, warmup_frac=0.1),
        )  # fmt: skip


class Spent(Frozen):
    """How long a piece took."""

    seconds: float
    cpu_seconds: float
    """Of all cores."""


@dataclass(frozen=True)
class RewardModel:
    """A reward model, as an adapter on the start."""

    stored: StoredAdapter
    normalization: Normalization
    test_accuracy_frac: float
    """Share of the other reward model's pairs that it orders right."""


@dataclass(frozen=True)
class Prepared:
    """Everything that PPO starts from."""

    encoder: Encoder
    layout: Layout
    rows: Rows
    start: Path
    proxy: RewardModel
    heldout: RewardModel
    spent: dict[str, Spent]


def prepare_models(plan: Preparation, work: Path, *, rows_folder: Path) -> Prepared:
    """Make what is not there yet.

    Args:
        plan: What is wanted.
        work: Where pieces are kept.
        rows_folder: Where the rows of `hh` are.
    """
    root = work / sha256_json(plan.model_dump(mode="json"))[:12]
    rows = choose_rows(plan.kind, plan.sizes, folder=rows_folder, seed=plan.seed)
    spent: dict[str, Spent] = {}

    def piece(name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        found = kept(root / name, make)
        spent[name] = Spent.model_validate(found["spent"])
        print(f"{name}: {spent[name].seconds:.0f} s {found['about'] or ''}", flush=True)
        about: dict[str, Any] = found["about"]
        return about

    piece("base", lambda place: _import(plan, place))
    base, start = root / "base" / "model", root / "start" / "model"
    chat = ChatTokenizer.load(base)
    maker = _Maker(
        plan, Encoder(chat, plan.max_prompt_tokens, plan.max_new_tokens), Layout(True, chat.pad_id, TOKENS_PER_BATCH)
    )
    piece("start", lambda place: maker.start(base, rows.sft, place))
    piece("answers", lambda place: maker.answers(start, rows, place))
    trees = _read_trees(root / "answers" / TREES)
    models = {}
    for name, other in (REWARD_MODELS, REWARD_MODELS[::-1]):
        about = piece(name, partial(maker.reward, start, trees, name, other))
        stored = read_adapter(root / name / "adapter")
        assert stored is not None, "every reward model is kept as an adapter"
        models[name] = RewardModel(stored, Normalization(about["gain"], about["bias"]), about["test_accuracy_frac"])
    return Prepared(maker.encoder, maker.layout, rows, start, models["proxy"], models["heldout"], spent)


def kept(place: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make a folder unless it is there; return what making it found, and the time it took then.

    A folder that was begun and not finished has another name, and is made anew.
    """
    if not (place / NOTE).exists():
        unfinished = place.with_name(f"{place.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with timed() as spent:
            about = make(unfinished)
        note = {"about": about, "spent": spent[0].model_dump()}
        (unfinished / NOTE).write_text(json.dumps(note), encoding="utf-8")
        unfinished.rename(place)
    found: dict[str, Any] = json.loads((place / NOTE).read_bytes())
    return found


@contextmanager
def timed() -> Iterator[list[Spent]]:
    """Yield a list that holds the time of the block once it has ended."""
    found: list[Spent] = []
    began, cpu_began = time.monotonic(), time.process_time()
    yield found
    found.append(Spent(seconds=time.monotonic() - began, cpu_seconds=time.process_time() - cpu_began))


@dataclass(frozen=True)
class _Maker:
    """Makes the pieces, each in a folder of its own."""

    plan: Preparation
    encoder: Encoder
    layout: Layout

    def start(self, base: Path, rows: list[Record], place: Path) -> dict[str, Any]:
        """Teach the base model the good answers."""
        settings = self.plan.settings(
            learning_rate=self.plan.sft_learning_rate, batch_size=12, epochs=1, seed=self.plan.seed
        )
        trained = prepare(load_causal_model(base, dtype=torch.float32), base, settings, seed=settings.seed)
        good = [row.model_copy(update={"responses": row.responses[:1], "ranks": ()}) for row in rows]
        plan = DataPlan.of([self.encoder.tree(row) for row in good], settings)
        series = _trained(SftRecipe(trained, plan, self.layout), settings)
        trained.save(place / "model")
        return {"last_loss": series[-1]["loss"]}

    def answers(self, start: Path, rows: Rows, place: Path) -> dict[str, Any]:
        """Write pairs, the good answer first, and the start's answers that give scores their scale."""
        trees = {}
        for name in REWARD_MODELS:
            share: list[Record] = getattr(rows, name)
            own = self._sampled(start, [row for row in share if len(row.responses) == 1], name)
            pairs = [self._pair(row, own) for row in share]
            trees[name] = [tree for tree in pairs if tree.response_ids[0] != tree.response_ids[1]]
        sampled = self._sampled(start, rows.policy[: self.plan.scale_samples], "scale")
        trees["scale"] = [
            group_tree(0, self._prompt(row), [sampled[row.id]]) for row in rows.policy[: self.plan.scale_samples]
        ]
        plain = {name: [[tree.prompt_ids, tree.response_ids] for tree in some] for name, some in trees.items()}
        (place / TREES).write_text(json.dumps(plain), encoding="utf-8")
        return {f"{name}_rows": len(some) for name, some in plain.items()}

    def reward(self, start: Path, trees: dict[str, list[Tree]], name: str, other: str, place: Path) -> dict[str, Any]:
        """Train a reward model on its pairs; measure it on the other's."""
        seed = derive_seed(self.plan.seed, "reward", name)
        settings = self.plan.settings(
            learning_rate=self.plan.reward_learning_rate, batch_size=8, epochs=self.plan.reward_epochs, seed=seed
        )
        model = load_scalar_model(start, dtype=torch.float32)
        init_head(model, seed=derive_seed(seed, "head"))
        trained = prepare(model, start, settings, seed=seed)
        head_of(trained.model).float().requires_grad_(requires_grad=True)
        recipe = RewardRecipe(
            trained, DataPlan.of(trees[name], settings), self.layout,
            objective=REWARD_LOSSES.build({"name": "bradley_terry", "centring": 0.01}),
            labels={tree.record_id: Label((1, 2)) for tree in trees[name]},
        )  # fmt: skip
        _trained(recipe, settings)
        right = [good > rest for good, rest in response_scores(trained.model, trees[other], self.layout).values()]
        raw = [score for (score,) in response_scores(trained.model, trees["scale"], self.layout).values()]
        gain, bias = normalization(torch.tensor(raw))
        _write(trained, settings, place)
        return {"gain": gain, "bias": bias, "test_accuracy_frac": sum(right) / len(right)}

    def _prompt(self, row: Record) -> tuple[int, ...]:
        return tuple(self.encoder.prompt(row.messages, where=row.id[:12])[0])

    def _sampled(self, start: Path, rows: list[Record], name: str) -> dict[str, tuple[int, ...]]:
        """Let the start answer prompts once at temperature 1; return the answers by row."""
        chat = self.encoder.chat
        model = load_causal_model(start, dtype=torch.float32)
        generator = Continuous().open(Policy(start, lambda: model), eos_id=chat.eos_id, pad_id=chat.pad_id)
        drawn = generator.generate(
            [self._prompt(row) for row in rows], SamplingSettings(max_new_tokens=self.plan.max_new_tokens),
            seed=derive_seed(self.plan.seed, "answers", name),
        )  # fmt: skip
        return {row.id: one.ids for row, one in zip(rows, drawn, strict=True)}

    def _pair(self, row: Record, own: dict[str, tuple[int, ...]]) -> Tree:
        tree = self.encoder.tree(row)
        rest = own[row.id] if row.id in own else tree.response_ids[1]
        return group_tree(0, tree.prompt_ids, [tree.response_ids[0], rest])


def _import(plan: Preparation, place: Path) -> dict[str, Any]:
    # The model's own template begins with a system turn that is half of a short prompt.
    import_base_model(plan.base, place / "model", revision=None, chat_template=TINY_TEMPLATE, seed=plan.seed)
    return {}


def _trained(recipe: SftRecipe | RewardRecipe, settings: OfflineSettings) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        return train(recipe, settings, Path(folder))


def _write(trained: TrainedModel, settings: OfflineSettings, place: Path) -> None:
    """Write a reward model as an adapter, which PPO puts on the policy's base."""
    assert isinstance(trained.adapter, PeftModel)
    assert isinstance(settings.adapter, LoraSettings)
    head_1D = head_of(trained.model).weight
    is_kept = write_adapter(trained.adapter, settings.adapter, head_1D, base_sha256={}, directory=place / "adapter")
    assert is_kept, "every adapted layer is of the backbone"


def _read_trees(path: Path) -> dict[str, list[Tree]]:
    return {
        name: [group_tree(k, prompt, responses) for k, (prompt, responses) in enumerate(rows)]
        for name, rows in json.loads(path.read_bytes()).items()
    }
