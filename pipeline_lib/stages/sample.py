"""Stage `sample`: let the base model answer, and add its answers to comparisons as rejected ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from pipeline_lib.hashing import canonical_json, derive_seed
from pipeline_lib.models.settings import Precision
from pipeline_lib.schema import Author, Record, Response, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen

VERSION = 1

_SAMPLED_SPLITS = (Split.REWARD, Split.POLICY, Split.REWARD_TEST)


class SampleConfig(Frozen):
    """Sampling of rejected answers."""

    max_prompts: int = Field(0, ge=0)
    """Comparisons that get an answer of the base model, in each split; 0 leaves the stage out."""
    max_new_tokens: int = Field(64, ge=4)
    """Tokens of an answer, at most."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of the distribution that is drawn from."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once."""
    max_prompt_tokens: int = Field(512, ge=8)
    """Longer prompts lose their beginning."""
    precision: Precision = "auto"
    """Number format of the base model."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of prompts and of the answers."""


def run(config: SampleConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Sample; inputs `base_model` and `dataset`, output kind `dataset`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.precision import default_device, resolve_dtype  # noqa: PLC0415  (torch)
    from pipeline_lib.models.sampling import SamplingSettings, sample  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.text.chat_template import ChatTokenizer  # noqa: PLC0415  (transformers)
    from pipeline_lib.text.encode import Encoder  # noqa: PLC0415  (transformers)

    directory = stage.fetch_model(context, inputs["base_model"], "base_model")
    encoder = Encoder(ChatTokenizer.load(directory), config.max_prompt_tokens, max_response_tokens=1)
    rows = {split: list(stage.read_records(context, inputs["dataset"], split)) for split in Split}
    chosen = [record for split in _SAMPLED_SPLITS for record in _choose(rows[split], config)]
    model = load_causal_model(directory, dtype=resolve_dtype(config.precision)).to(default_device())
    prompts = [encoder.prompt(record.messages, where=record.id[:12])[0] for record in chosen]
    samples = sample(
        model, prompts,
        SamplingSettings(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            batch_size=config.batch_size,
        ),
        eos_id=encoder.chat.eos_id, pad_id=encoder.chat.pad_id, seed=derive_seed(config.seed, "sample stage"),
        on_batch=lambda done: context.progress(done / len(prompts), f"answered {done}/{len(prompts)}"),
    )  # fmt: skip
    author = Author(
        kind="model", name=str(inputs["base_model"]),
        sampling={"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed},
    )  # fmt: skip
    longer = {
        record.id: _with_answer(record, Response(content=encoder.chat.decode(list(drawn.ids)), author=author))
        for record, drawn in zip(chosen, samples, strict=True)
    }
    for split, records in rows.items():
        write_records(context.workdir / f"{split.value}.jsonl", (longer.get(record.id, record) for record in records))
    added = sum(longer[record.id] is not record for record in chosen)
    summary = {"prompts": len(chosen), "answers_added": added, "answers_unusable": len(chosen) - added}
    (context.workdir / "summary.json").write_bytes(canonical_json(summary))
    return StageOutput("dataset", context.workdir, {name: float(count) for name, count in summary.items()})


def _choose(records: list[Record], config: SampleConfig) -> list[Record]:
    comparisons = [record for record in records if record.kind == "comparison"]
    order = sorted(comparisons, key=lambda record: derive_seed(config.seed, "choose", record.id))
    return order[: config.max_prompts]


def _with_answer(record: Record, answer: Response) -> Record:
    """Add an answer as no better than the worst; an empty or repeated one is left out."""
    texts = {response.content.strip() for response in record.responses}
    if not answer.content.strip() or answer.content.strip() in texts:
        return record
    return Record.create(
        record.messages, (*record.responses, answer), (*record.ranks, max(record.ranks)),
        origin=record.origin, group=record.group, split=record.split,
        strength=record.strength, weight=record.weight, tags=record.tags,
    )  # fmt: skip


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.model_dump_json() + "\n")
