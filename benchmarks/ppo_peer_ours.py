"""One process of our side of the PPO comparison: `python -m benchmarks.ppo_peer_ours prepare|measure PLAN`.

The recipe and the loop are the real ones; a rule scores in place of the reward model.
"""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from benchmarks.learns_task import NoCheckpoints, make_task
from benchmarks.ppo_peer_jobs import PpoMeasured, PpoPlan, PpoPreset, Prepared
from benchmarks.ppo_peer_rule import score
from benchmarks.rows import records
from benchmarks.work import processor_name
from pipeline_lib.models.adapters import add_adapter
from pipeline_lib.models.base import SMOLLM2, import_base_model, load_causal_model
from pipeline_lib.models.heads import head_of, init_head, load_scalar_model
from pipeline_lib.models.precision import default_device
from pipeline_lib.models.scoring import Layout
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.models.shared_base import StoredAdapter, read_adapter, write_adapter
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.training.collection import Scored
from pipeline_lib.training.critic import Critic, Normalization
from pipeline_lib.training.loop import LoopHooks, TrainingLoop
from pipeline_lib.training.plan import DataPlan, permutation
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.settings import OptimizerSettings, PpoSettings, TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel, prepare

NO_CLIPPING = 1e9
"""TRL's PPOTrainer clips no gradient."""
PROMPTS_FILE = "prepared.json"
PADDING = ("<|endoftext|>", "<pad>", "<|pad|>")
"""What may pad prompts, in one tokenizer or another."""


@dataclass(frozen=True)
class Rule:
    """The rule as what gives PPO its scores (`collection.ResponseScorer`)."""

    chat: ChatTokenizer
    wanted: tuple[str, ...]

    def score(self, prompts: Sequence[Tree], responses: Sequence[Tree], is_finished: Sequence[bool]) -> Scored:  # noqa: ARG002
        """Score the text of every response up to its end."""
        ends = (self.chat.eos_id,)
        texts = [
            self.chat.tokenizer.decode([id_ for id_ in tree.response_ids[0] if id_ not in ends]) for tree in responses
        ]
        return Scored(torch.tensor([score(text, self.wanted) for text in texts]))


def main() -> None:
    """Do what the command line says."""
    action, path = sys.argv[1:]
    plan = PpoPlan.model_validate_json(Path(path).read_bytes())
    torch.set_num_threads(plan.threads)
    {"prepare": prepare_files, "measure": measure}[action](plan)


def prepare_files(plan: PpoPlan) -> None:
    """Write the model that both sides start from, the prompts of every iteration, and an adapter to score with."""
    preset, folder = plan.preset, plan.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if preset.model == "toy":
        task = make_task(folder, seed=0)
        model, prompts = task.directory, list(task.prompts)
    else:
        model = folder / "model"
        import_base_model(SMOLLM2, model, revision=None, chat_template=None, seed=preset.seed)
        encoder = Encoder(ChatTokenizer.load(model), 512, 512)
        rows = records(encoder, count=preset.responses, responses=1, seed=preset.seed)
        prompts = [encoder.tree(row.model_copy(update={"responses": (), "ranks": ()})) for row in rows]
    data = DataPlan.of(prompts, settings_of(preset))
    batches = [[list(tree.prompt_ids) for tree in data.full_batch(number)] for number in range(preset.iterations)]
    keep_reward_model(preset, model, folder)
    found = prepared(model, batches)
    (folder / PROMPTS_FILE).write_text(found.model_dump_json())


def prepared(model: Path, prompts: list[list[list[int]]]) -> Prepared:
    """Note what both sides start from."""
    tokenizer = ChatTokenizer.load(model).tokenizer
    causal = load_causal_model(model, dtype=torch.float32)
    ids_BT = torch.tensor([prompts[0][0]])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(causal(input_ids=ids_BT[:, :-1]).logits[0], ids_BT[0, 1:])
    pad_token = next(token for token in PADDING if token in tokenizer.get_vocab())
    assert pad_token != tokenizer.eos_token
    return Prepared(
        model=model, prompts=prompts, processor=processor_name(default_device()), eos_token=tokenizer.eos_token,
        pad_token=pad_token, rope_theta=causal.config.rope_parameters["rope_theta"], first_prompt_nats=float(nats),
    )  # fmt: skip


def keep_reward_model(preset: PpoPreset, model: Path, folder: Path) -> None:
    """Write a reward model on the base that knows nothing: whole, and where adapters are trained as one."""
    scalar = load_scalar_model(model, dtype=torch.float32)
    init_head(scalar, seed=preset.seed)
    if preset.trainable == "full":
        scalar.save_pretrained(folder / "reward")
        return
    adapter = lora(preset)
    wrapper = add_adapter(scalar, adapter, seed=preset.seed, encode=lambda _: [])
    assert isinstance(wrapper, PeftModel)
    head_1D = head_of(scalar).weight
    assert write_adapter(wrapper, adapter, head_1D, base_sha256={}, directory=folder / "adapter")


def measure(plan: PpoPlan) -> None:
    """Train once and write down what it took."""
    found = Prepared.model_validate_json((plan.folder / PROMPTS_FILE).read_bytes())
    settings = settings_of(plan.preset)
    chat = ChatTokenizer.load(found.model)
    recipe = ppo_recipe(found, settings, plan.folder, scorer=Rule(chat, plan.preset.wanted))
    told = run(recipe, settings)
    steps = recipe.steps_per_iteration
    groups = recipe.parameter_groups()
    measured = PpoMeasured(
        side="ours", iteration_ends_s=told.ends_s[steps - 1 :: steps], peak_bytes=told.peak_bytes,
        scores=[row["score"] for row in told.series[::steps]],
        kl_nats=[row["ref_kl_nats"] for row in told.series[::steps]],
        trainable_parameters=sum(value.numel() for group in groups for value in group.parameters.values()),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        note="policy, reference, reward model and value function on one base" if recipe.critic.is_on_policy else "",
    )  # fmt: skip
    plan.output.write_text(measured.model_dump_json())


@dataclass
class Told:
    """What a training told, and what it held."""

    series: list[dict[str, float]]
    ends_s: list[float]
    """When each step was done."""
    peak_bytes: int = 0


def run(recipe: Recipe, settings: TrainingSettings) -> Told:
    """Run the real loop over a recipe."""
    told = Told([], [])

    def on_step(step: int, figures: Mapping[str, float]) -> None:  # noqa: ARG001 - see LoopHooks
        told.ends_s.append(time.perf_counter())
        told.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    hooks = LoopHooks(on_step=on_step, on_progress=lambda *_: None, should_stop=lambda: False)
    with tempfile.TemporaryDirectory() as scratch:
        told.series = TrainingLoop(
            recipe, settings, workdir=Path(scratch), checkpoints=NoCheckpoints(), checkpoint_every_s=1e9, hooks=hooks
        ).run()
    return told


def ppo_recipe(
    found: Prepared, settings: PpoSettings, folder: Path, *, scorer: Rule | None, is_shared: bool = True
) -> PpoRecipe:
    """Return PPO on the prepared prompts, its critic on the policy's base where adapters are trained.

    Args:
        found: The model and its prompts.
        settings: PPO's.
        folder: Where the reward model is.
        scorer: Gives the scores; None: the reward model.
        is_shared: False: reward model and value function on a base of their own.
    """
    policy = policy_of(found.model, settings)
    chat = ChatTokenizer.load(found.model)
    stored = read_adapter(folder / "adapter")
    how = Normalization()
    if stored is None or not is_shared:
        directory = folder / "reward" if stored is None else found.model
        critic = Critic(directory, settings, how, seed=settings.seed + 1, value_init=settings.value_init)
    else:
        critic = on_policy(policy, stored, settings)
    trees = [
        Tree(f"{number}-{place}", tuple(ids), (), (False,) * len(ids))
        for number, batch in enumerate(found.prompts)
        for place, ids in enumerate(batch)
    ]
    # The data plan shuffles them by the seed: so arranged, every iteration gets the prompts that TRL's gets.
    places = permutation(len(trees), settings.seed, "epoch", 0)
    prompts = [tree for _, tree in sorted(zip(places, trees, strict=True), key=lambda pair: pair[0])]
    layout = Layout(policy.is_packed and critic.value.is_packed, chat.pad_id, settings.tokens_per_batch)
    return PpoRecipe(
        policy, Reference.of(policy), critic, prompts, settings=settings, layout=layout, chat=chat,
        should_stop=lambda: False, on_text=lambda _: None, scorer=scorer,
    )  # fmt: skip


def on_policy(policy: TrainedModel, stored: StoredAdapter, settings: PpoSettings) -> Critic:
    """Put the critic on the policy's base."""
    return Critic.on_policy(policy, stored, Normalization(), seed=settings.seed + 1, value_init=settings.value_init)


def policy_of(directory: Path, settings: TrainingSettings) -> TrainedModel:
    """Load the model that is trained."""
    return prepare(load_causal_model(directory, dtype=torch.float32), directory, settings, seed=settings.seed)


def lora(preset: PpoPreset) -> LoraSettings:
    """Return the adapters' settings."""
    return LoraSettings(rank=preset.lora_rank, alpha=preset.lora_alpha)


def settings_of(preset: PpoPreset) -> PpoSettings:
    """Return a preset as our settings: what TRL's trainer does, as far as it is a setting."""
    return PpoSettings(
        iterations=preset.iterations, batch_size=preset.batch_size, minibatches=preset.minibatches,
        ppo_epochs=preset.ppo_epochs, max_new_tokens=preset.new_tokens, stops_at_eos=preset.stops_at_eos,
        temperature=preset.temperature, kl_coef=preset.kl_coef, kl_target_nats=None, max_kl_nats=1e9,
        gamma=preset.gamma, gae_lambda=preset.gae_lambda, clip_range=preset.clip_range,
        value_clip_range=preset.value_clip_range, value_coef=preset.value_coef, value_init="zero",
        missing_eos="keep", whiten_variance="unbiased", tokens_per_batch=preset.tokens_per_batch,
        precision="fp32", adapter=lora(preset) if preset.trainable == "lora" else None, seed=preset.seed,
        optimizer=OptimizerSettings(
            learning_rate=preset.learning_rate, betas=preset.betas, epsilon=preset.epsilon, schedule="constant",
            warmup_frac=0.0, max_grad_norm=NO_CLIPPING,
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
