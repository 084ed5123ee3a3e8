"""The score that InstructGPT chooses SFT models by: a reward model's, of the model's own answers to held-out prompts.

Every measurement answers the same prompts with the same random numbers, so that two of them differ by
the weights alone.

Source: Ouyang et al. 2022 (arXiv 2203.02155), appendix C.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from pipeline_lib.errors import DataError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.adapters import in_evaluation_mode
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.critic import FrozenRewardModel, Normalization
from pipeline_lib.training.measuring import scores_in_order
from pipeline_lib.training.plan import permutation
from pipeline_lib.training.settings import SelectionSettings, TrainingSettings


@dataclass(frozen=True)
class AnswerScore:
    """A frozen reward model and the prompts that a model under training answers for it."""

    reward_model: FrozenRewardModel
    prompts: tuple[Tree, ...]
    """Without responses."""
    settings: SelectionSettings
    layout: Layout
    eos_id: int
    seed: int

    @classmethod
    def load(
        cls,
        directory: Path,
        normalization: Normalization,
        held_out: Sequence[Tree],
        *,
        selection: SelectionSettings,
        training: TrainingSettings,
        chat: ChatTokenizer,
    ) -> AnswerScore:
        """Load a reward model's folder, and choose prompts among the held-out rows by the seed.

        Args:
            directory: The reward model's files.
            normalization: Its gain and bias.
            held_out: Rows that are not trained on.
            selection: How many prompts are answered, and how.
            training: Precision, token budget and seed.
            chat: The tokenizer, which must be the reward model's too.
        """
        reward_model = FrozenRewardModel(directory, normalization, settings=training)
        layout = Layout(reward_model.is_packed, chat.pad_id, training.tokens_per_batch)
        distinct = list({tree.prompt_ids: tree for tree in held_out}.values())
        chosen = permutation(len(distinct), training.seed, "selection")[: selection.prompts]
        prompts = tuple(replace(distinct[index], response_ids=()) for index in sorted(chosen))
        seed = derive_seed(training.seed, "selection answers")
        return cls(reward_model, prompts, selection, layout, chat.eos_id, seed)

    def of(self, policy: PreTrainedModel) -> float:
        """Let a model answer the prompts and return the mean score, normalised.

        Raises:
            DataError: A score is not finite; the rows are named.
        """
        settings = SamplingSettings(
            max_new_tokens=self.settings.max_new_tokens, temperature=self.settings.temperature,
            batch_size=self.settings.batch_size,
        )  # fmt: skip
        with in_evaluation_mode(policy):
            answers = sample(
                policy, [tree.prompt_ids for tree in self.prompts], settings,
                eos_id=self.eos_id, pad_id=self.layout.pad_id, seed=self.seed,
            )  # fmt: skip
        trees = [replace(tree, response_ids=(answer.ids,)) for tree, answer in zip(self.prompts, answers, strict=True)]
        # The mean is taken of raw scores, in double precision, and normalised then.
        scores = scores_in_order(
            self.reward_model, trees, self.layout, device=self.reward_model.model.device, should_stop=lambda: False,
            is_raw=True,
        ).tolist()  # fmt: skip
        broken = [tree.record_id[:12] for tree, score in zip(trees, scores, strict=True) if not math.isfinite(score)]
        if broken:
            raise DataError(
                f"the reward model of sft.select_by gave {len(broken)} answers no finite score; rows: "
                f"{', '.join(broken[:8])}",
                next_step="choose another reward model, or set precision: fp32",
            )
        scale = self.reward_model.normalization
        return scale.gain * math.fsum(scores) / len(scores) + scale.bias
