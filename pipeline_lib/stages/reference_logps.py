"""Stage `reference_logps`: what the reference says of every response, computed once.

The figures are kept in parts, each under a key of what they depend on and of nothing else: the
model's weights and adapters, the chat template, the token ids and the number format. A run with
another loss, beta, learning rate, batch size or even another data set of the same texts finds the
parts, and a pass that was killed goes on after its last part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline_lib.hashing import canonical_json, sha256_json
from pipeline_lib.models.settings import Precision
from pipeline_lib.schema import ArtifactRef, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pipeline_lib.text.encode import Tree

VERSION = 4

_TREES_PER_PART = 128
_TOKENS_PER_FORWARD = 1024
"""Fixed, so that a part has the same bits whatever the training's batches are."""
_PART = "reference_logps_part"
_WEIGHTS = (".safetensors", "config.json")
"""Endings of the files that decide what a model computes."""


class ReferenceLogpsConfig(Frozen):
    """How responses are encoded and scored; taken from the preference stage's settings."""

    max_prompt_tokens: int = Field(512, ge=8)
    max_response_tokens: int = Field(512, ge=4)
    precision: Precision = "auto"
    with_mismatched: bool = False
    """Score every prompt with the next row's response too, as KTO's KL estimate asks."""


def run(config: ReferenceLogpsConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Score all responses; inputs `sft_model` and `dataset`, output kind `reference_logps`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.precision import default_device, resolve_dtype  # noqa: PLC0415  (torch)
    from pipeline_lib.models.scoring import Layout, response_logps  # noqa: PLC0415  (torch)
    from pipeline_lib.models.trees import supports_trees  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.text.chat_template import ChatTokenizer  # noqa: PLC0415  (transformers)
    from pipeline_lib.text.encode import Encoder  # noqa: PLC0415  (transformers)
    from pipeline_lib.training.preferences import comparisons_of, mismatched  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    chat = ChatTokenizer.load(directory)
    encoder = Encoder(chat, config.max_prompt_tokens, config.max_response_tokens)
    rows = stage.read_records(context, inputs["dataset"], Split.POLICY)
    trees = list(comparisons_of(rows, encoder).trees)
    stage.require_rows(trees, "comparisons or rated responses", Split.POLICY)
    if config.with_mismatched:
        trees += mismatched(trees)
    dtype = resolve_dtype(config.precision)
    model_key = {
        "weights": weights_of(context, inputs["sft_model"]), "template_sha256": chat.template_sha256,
        "dtype": str(dtype),
    }  # fmt: skip
    model: Any = None
    found: dict[str, list[float]] = {}
    num_found = 0
    for part in _parts(trees):
        key = part_key(model_key, part)
        kept = context.store.find(key)
        if kept is not None:
            num_found += 1
            logps = context.store.read_json(kept, "logps.json")
        else:
            if context.should_stop():
                stage.stop_as_asked(f"after {len(found)} of {len(trees)} rows")
            if model is None:
                model = load_causal_model(directory, dtype=dtype).to(default_device())
            layout = Layout(supports_trees(model, log=context.log), chat.pad_id, _TOKENS_PER_FORWARD)
            by_id = response_logps(model, part, layout)
            logps = [by_id[tree.record_id] for tree in part]
            _keep(context, key, model_key, logps)
        found.update({tree.record_id: row for tree, row in zip(part, logps, strict=True)})
        context.progress(len(found) / len(trees), f"scored {len(found)}/{len(trees)} rows")
    (context.workdir / "logps.json").write_bytes(canonical_json(found))
    if num_found:
        context.log(f"{num_found} of {len(_parts(trees))} parts were there already")
    return StageOutput("reference_logps", context.workdir, {"rows": float(len(found))})


def weights_of(context: StageContext, model: ArtifactRef) -> dict[str, str]:
    """Return the sha256 of every file that decides what a model artifact computes, adapters included."""
    files = context.store.manifest(model).files
    return {name: entry.sha256 for name, entry in sorted(files.items()) if name.endswith(_WEIGHTS)}


def part_key(model_key: dict[str, Any], trees: Sequence[Tree]) -> str:
    """Return the key of a part's figures: a function of the model, the template, the ids and the format."""
    ids = [[list(tree.prompt_ids), [list(response) for response in tree.response_ids]] for tree in trees]
    counted = [[index for index, counts in enumerate(tree.prompt_counts) if counts] for tree in trees]
    return sha256_json({"stage": _PART, "version": VERSION, **model_key, "ids": ids, "prompt_counts": counted})


def _parts(trees: Sequence[Tree]) -> list[Sequence[Tree]]:
    """Cut the rows into parts, in an order that depends on their texts alone."""
    ordered = sorted(trees, key=lambda tree: (tree.prompt_ids, tree.response_ids, tree.record_id))
    return [ordered[start : start + _TREES_PER_PART] for start in range(0, len(ordered), _TREES_PER_PART)]


def _keep(context: StageContext, key: str, model_key: dict[str, Any], logps: list[list[float]]) -> None:
    directory = context.workdir.parent / f"part-{key[:12]}"
    directory.mkdir(parents=True)
    (directory / "logps.json").write_text(json.dumps(logps))
    context.store.commit(
        directory, kind="reference_logps_part", stage=_PART, stage_version=VERSION, config=model_key, inputs={},
        metrics={"rows": float(len(logps))}, measurements={}, stage_key=key,
    )  # fmt: skip
