"""Stage `evaluate`: one model on the held-out prompts, one result per prompt.

Every model of a run has its own evaluation artifact on the same prompts, so a champion that was
evaluated once is never evaluated again, and all comparisons are paired by prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.settings import Precision
from pipeline_lib.schema import ExampleResult, Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from pipeline_lib.models.sampling import Sample
    from pipeline_lib.text.chat_template import ChatTokenizer
    from pipeline_lib.text.encode import Tree

VERSION = 4


class EvaluateConfig(Frozen):
    """Evaluation on the gate split, which no stage trains on."""

    max_prompts: int = Field(128, ge=2)
    """Held-out prompts, chosen by the seed."""
    max_new_tokens: int = Field(128, ge=4)
    """Tokens of a model's answer, at most."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the answers; 0 takes the most likely token."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once."""
    max_prompt_tokens: int = Field(512, ge=8)
    """Longer prompts lose their beginning."""
    tokens_per_batch: int = Field(1024, ge=16)
    """Tokens of one forward, at most."""
    precision: Precision = "auto"
    """Number format of the models."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of prompts and of the answers."""


def run(config: EvaluateConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Evaluate; inputs `model`, `reference_model`, `reward_model`, `dataset`; kind `evaluation`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.precision import default_device, resolve_dtype  # noqa: PLC0415  (torch)
    from pipeline_lib.models.sampling import SamplingSettings, sample  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.text.chat_template import ChatTokenizer  # noqa: PLC0415  (transformers)
    from pipeline_lib.text.encode import Encoder  # noqa: PLC0415  (transformers)

    directory = stage.fetch_model(context, inputs["model"], "model")
    chat = ChatTokenizer.load(directory)
    stage.require_template(directory, chat)
    encoder = Encoder(chat, config.max_prompt_tokens, max_response_tokens=4 * config.max_new_tokens)
    records = held_out(list(stage.read_records(context, inputs["dataset"], Split.GATE)), config)
    trees = [encoder.tree(record) for record in stage.require_rows(records, "rows", Split.GATE)]
    dtype = resolve_dtype(config.precision)
    model = load_causal_model(directory, dtype=dtype).to(default_device())
    samples = sample(
        model, [tree.prompt_ids for tree in trees],
        SamplingSettings(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, batch_size=config.batch_size
        ),
        eos_id=chat.eos_id, pad_id=chat.pad_id, seed=derive_seed(config.seed, "evaluate"),
        on_batch=lambda done: context.progress(0.6 * done / len(trees), f"answered {done}/{len(trees)}"),
    )  # fmt: skip
    context.progress(0.6, "scoring the answers")
    figures = _figures(config, inputs, context, model, chat.pad_id, records, trees, samples)
    with (context.workdir / "examples.jsonl").open("w", encoding="utf-8") as file:
        for record, tree, drawn in zip(records, trees, samples, strict=True):
            result = _result(record, chat, drawn, figures[tree.record_id])
            file.write(result.model_dump_json() + "\n")
    return StageOutput("evaluation", context.workdir, _summary(figures))


def held_out(records: list[Record], config: EvaluateConfig) -> list[Record]:
    """Choose the held-out rows: one a prompt, its demonstration where it has one, by the seed."""
    best: dict[str, Record] = {}
    for record in records:
        key = record.group
        if key not in best or (best[key].kind != "demonstration" and record.kind == "demonstration"):
            best[key] = record
    order = sorted(best.values(), key=lambda record: derive_seed(config.seed, "held out", record.id))
    return [_with_reference_only(record) for record in order[: config.max_prompts]]


def _with_reference_only(record: Record) -> Record:
    """Keep the best response as the reference answer; a prompt without one keeps none."""
    if record.kind != "comparison":
        return record
    best = record.responses[record.ranks.index(min(record.ranks))]
    return record.model_copy(update={"responses": (best,), "ranks": ()})


def _figures(
    config: EvaluateConfig,
    inputs: Inputs,
    context: StageContext,
    model: PreTrainedModel,
    pad_id: int,
    records: list[Record],
    trees: list[Tree],
    samples: list[Sample],
) -> dict[str, dict[str, float]]:
    """Score references and answers under the model, the reference model and the reward model."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.heads import load_scalar_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.scoring import Layout, response_logps, response_scores  # noqa: PLC0415  (torch)
    from pipeline_lib.models.trees import supports_trees  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)

    plain = [replace(tree, prompt_counts=(False,) * len(tree.prompt_ids)) for tree in trees]
    answers = [replace(tree, response_ids=(drawn.ids,)) for tree, drawn in zip(plain, samples, strict=True)]
    both = [replace(t, response_ids=(*t.response_ids, *a.response_ids)) for t, a in zip(plain, answers, strict=True)]
    layout = Layout(supports_trees(model, log=context.log), pad_id, config.tokens_per_batch)
    own = response_logps(model, both, layout)
    if inputs["reference_model"] == inputs["model"]:
        reference = {key: values[-1:] for key, values in own.items()}
    else:
        directory = stage.fetch_model(context, inputs["reference_model"], "reference_model")
        reference_model = load_causal_model(directory, dtype=model.dtype).to(model.device)
        reference = response_logps(reference_model, _as_asked(directory, records, samples, config), layout)
        del reference_model
    context.progress(0.9, "scoring with the reward model")
    directory = stage.fetch_model(context, inputs["reward_model"], "reward_model")
    normalization = stage.normalization_of(directory)
    reward_model = load_scalar_model(directory, dtype=model.dtype).to(model.device).eval()
    scored = response_scores(reward_model, _as_asked(directory, records, samples, config), layout)
    figures: dict[str, dict[str, float]] = {}
    for tree in plain:
        key = tree.record_id
        figures[key] = {
            "logp": own[key][-1], "reference_logp": reference[key][0],
            "score": normalization(scored[key][0]),
        }  # fmt: skip
        if tree.response_ids:
            figures[key] |= {"nll": -own[key][0], "reference_tokens": float(len(tree.response_ids[0]))}
    return figures


def _as_asked(directory: Path, records: list[Record], samples: list[Sample], config: EvaluateConfig) -> list[Tree]:
    """Put the answers behind their prompts as a scoring model's own template has these.

    A model may answer from behind words of its own (`stages.conditional`), which its scorers never saw.
    """
    from pipeline_lib.text.chat_template import ChatTokenizer  # noqa: PLC0415  (transformers)
    from pipeline_lib.text.encode import Encoder, Tree, place_of  # noqa: PLC0415  (transformers)

    encoder = Encoder(ChatTokenizer.load(directory), config.max_prompt_tokens, max_response_tokens=1)
    prompts = [tuple(encoder.prompt(record.messages, where=place_of(record))[0]) for record in records]
    return [
        Tree(record.id, prompt, (drawn.ids,), (False,) * len(prompt))
        for record, prompt, drawn in zip(records, prompts, samples, strict=True)
    ]


def _result(record: Record, chat: ChatTokenizer, drawn: Sample, figures: dict[str, float]) -> ExampleResult:
    from pipeline_lib.evaluation.text_metrics import rouge_l  # noqa: PLC0415

    reference = record.responses[0].content if record.responses else ""
    response = chat.decode(list(drawn.ids))
    return ExampleResult(
        record_id=record.id, prompt=record.messages, reference=reference, response=response,
        response_tokens=len(drawn.ids), is_finished=drawn.is_finished,
        reference_nll_nats=figures.get("nll"), reference_tokens=int(figures.get("reference_tokens", 0)),
        rouge_l_frac=rouge_l(response, reference) if reference else None,
        score=figures["score"], logp=figures["logp"], reference_model_logp=figures["reference_logp"],
    )  # fmt: skip


def _summary(figures: dict[str, dict[str, float]]) -> dict[str, float | None]:
    import math  # noqa: PLC0415

    rows = list(figures.values())
    tokens = sum(row.get("reference_tokens", 0.0) for row in rows)
    nll = sum(row.get("nll", 0.0) for row in rows)
    return {
        "prompts": float(len(rows)),
        "perplexity": math.exp(min(nll / tokens, 700.0)) if tokens else None,
        "score": sum(row["score"] for row in rows) / len(rows),
        "kl_nats": sum(row["logp"] - row["reference_logp"] for row in rows) / len(rows),
    }
