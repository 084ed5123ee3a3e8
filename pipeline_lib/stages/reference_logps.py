"""Stage `reference_logps`: what the reference says of every pair, computed once.

The artifact depends on the model, the pairs and their encoding alone, so every run that needs
these figures (another loss, another beta, another learning rate) finds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline_lib.hashing import canonical_json, sha256_json
from pipeline_lib.models.settings import Precision
from pipeline_lib.schema import ArtifactRef, Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pipeline_lib.text.encode import Encoder, Tree

VERSION = 1


class ReferenceLogpsConfig(Frozen):
    """How pairs are encoded and scored; taken from the preference stage's settings."""

    max_prompt_tokens: int = Field(512, ge=8)
    max_response_tokens: int = Field(512, ge=4)
    tokens_per_batch: int = Field(1024, ge=16)
    precision: Precision = "auto"


def run(config: ReferenceLogpsConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Score all pairs; inputs `sft_model` and `dataset`, output kind `reference_logps`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.logprobs import supports_trees  # noqa: PLC0415  (torch)
    from pipeline_lib.models.precision import default_device, resolve_dtype  # noqa: PLC0415  (torch)
    from pipeline_lib.models.scoring import Layout, response_logps  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.text.chat_template import ChatTokenizer  # noqa: PLC0415  (transformers)
    from pipeline_lib.text.encode import Encoder  # noqa: PLC0415  (transformers)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    chat = ChatTokenizer.load(directory)
    encoder = Encoder(chat, config.max_prompt_tokens, config.max_response_tokens)
    trees = policy_pairs(context, inputs["dataset"], encoder)
    model = load_causal_model(directory, dtype=resolve_dtype(config.precision)).to(default_device())
    layout = Layout(supports_trees(model), chat.pad_id, config.tokens_per_batch)
    logps = response_logps(
        model, trees, layout,
        on_batch=lambda done: context.progress(done / len(trees), f"scored {done}/{len(trees)} pairs"),
    )  # fmt: skip
    (context.workdir / "logps.json").write_bytes(canonical_json(logps))
    return StageOutput("reference_logps", context.workdir, {"pairs": float(len(logps))})


def policy_pairs(context: StageContext, dataset: ArtifactRef, encoder: Encoder) -> list[Tree]:
    """Encode every (better, worse) pair of the policy split as a tree of two, the better first."""
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)

    comparisons = [
        record for record in stage.read_records(context, dataset, Split.POLICY) if record.kind == "comparison"
    ]
    stage.require_rows(comparisons, "comparisons", Split.POLICY)
    return [encoder.tree(pair) for record in comparisons for pair in pairs_of(record)]


def pairs_of(record: Record) -> list[Record]:
    """Return the (better, worse) pairs of a comparison, each with an id of its own."""
    pairs = []
    for better, rank in zip(record.responses, record.ranks, strict=True):
        for worse, other in zip(record.responses, record.ranks, strict=True):
            if rank < other:
                key = sha256_json([record.id, better.content, worse.content])
                pairs.append(record.model_copy(update={"id": key, "responses": (better, worse), "ranks": (1, 2)}))
    return pairs
