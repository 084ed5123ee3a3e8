"""A job's inputs on our side: the model, the rows as a dataset artifact, the reference's figures."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.jobs import JOBS, PRESETS, Plan
from benchmarks.rows import pair_records, records
from benchmarks.same import SEED
from benchmarks.workbench import Workbench, rows_per_step
from pipeline_lib.models.base import import_base_model
from pipeline_lib.schema import ArtifactRef, Record, Split
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder
from pipeline_lib.training.plan import permutation

_SPLITS = {"preference": (Split.POLICY,), "reward": (Split.REWARD, Split.REWARD_TEST), "sft": (Split.SFT,)}
_MODEL_ROLE = {"preference": "sft_model", "reward": "sft_model", "sft": "base_model"}
_DRAWS = 200


@dataclass(frozen=True)
class Prepared:
    """What came of it."""

    model: Path
    """A plain model folder that both sides load."""
    pack_bins: int | None


def prepare_inputs(bench: Workbench, plan: Plan) -> Prepared:
    """Make and commit a job's inputs; `inputs.json` names them by role."""
    spec = JOBS[plan.job]
    model, directory = _model(bench, PRESETS[plan.options.preset].model)
    encoder = Encoder(ChatTokenizer.load(directory), 512, 512)
    size = rows_per_step(plan.job, plan.options)
    count = size * plan.options.steps
    bins = None
    if plan.job == "sft":
        pool = records(encoder, count=4 * count, responses=1, seed=SEED)
        rows, bins = _even_steps(pool, encoder, size=size, steps=plan.options.steps, limit=plan.options.pack_tokens)
        rows = in_plan_order(rows)
    else:
        rows = records(encoder, count=count, responses=spec.responses, seed=SEED)
    splits = _SPLITS[spec.stage]
    (plan.folder / "texts.jsonl").write_text("".join(json.dumps(_texts(row)) + "\n" for row in rows))
    inputs = {_MODEL_ROLE[spec.stage]: model, "dataset": _dataset(bench, rows, splits)}
    if plan.job == "kwise":
        # Row i of the file is trained on at place order^-1(i): pairs stand where their comparison stands.
        order = permutation(len(rows), SEED, "epoch", 0)
        pairs = [pair for index in order for pair in pair_records(rows[index])]
        inputs["pairs"] = _dataset(bench, in_plan_order(pairs), splits)
    if spec.stage == "preference":
        config = {"precision": plan.options.precision}
        inputs["reference_logps"] = bench.run("reference_logps", config, inputs)
    (plan.folder / "inputs.json").write_text(json.dumps({role: ref.model_dump() for role, ref in inputs.items()}))
    return Prepared(directory, bins)


def in_plan_order(wanted: Sequence[Record]) -> list[Record]:
    """Arrange rows so that the data plan, which shuffles them by the seed, trains on them in this order."""
    arranged: list[Record | None] = [None] * len(wanted)
    for row, index in zip(wanted, permutation(len(wanted), SEED, "epoch", 0), strict=True):
        arranged[index] = row
    return [row for row in arranged if row is not None]


def _even_steps(
    pool: Sequence[Record], encoder: Encoder, *, size: int, steps: int, limit: int
) -> tuple[list[Record], int]:
    """Draw updates whose rows fill one and the same number of packed sequences.

    TRL takes a fixed number of sequences an update; so both sides can take the same rows in each.
    """
    lengths = {row.id: encoder.tree(row).num_tokens for row in pool}
    generator = random.Random(SEED)
    tried = [best_fit([lengths[row.id] for row in generator.sample(list(pool), size)], limit) for _ in range(_DRAWS)]
    bins = Counter(tried).most_common(1)[0][0]
    left, chosen = list(pool), list[Record]()
    while len(chosen) < size * steps:
        drawn = generator.sample(left, size)
        if best_fit([lengths[row.id] for row in drawn], limit) == bins:
            chosen += drawn
            taken = {row.id for row in drawn}
            left = [row for row in left if row.id not in taken]
    return chosen, bins


def best_fit(lengths: Sequence[int], limit: int) -> int:
    """Return how many sequences best-fit decreasing packs some rows into."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, free in enumerate(room) if free >= length]
        if fitting:
            room[min(fitting, key=lambda index: room[index])] -= length
        else:
            room.append(limit - length)
    return len(room)


def _model(bench: Workbench, source: str) -> tuple[ArtifactRef, Path]:
    """Import the base model once for all jobs; later jobs find its folder."""
    directory, note = bench.home / source, bench.home / f"{source}.json"
    if note.exists():
        return ArtifactRef.model_validate_json(note.read_bytes()), directory / "model"
    if source == "llama-1b":
        _write_llama(directory / "model")
    else:
        import_base_model(source, directory / "model", revision=None, chat_template=None, seed=SEED)
    ref = bench.commit(directory, kind="model")
    note.write_text(ref.model_dump_json())
    return ref, directory / "model"


def _write_llama(directory: Path) -> None:
    """Write a Llama of 1.1 billion random weights with SmolLM2's tokenizer."""
    import_base_model("smollm2-135m-instruct", directory, revision=None, chat_template=None, seed=SEED)
    tokenizer = ChatTokenizer.load(directory).tokenizer
    torch.manual_seed(SEED)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(directory)


def _texts(row: Record) -> dict[str, list[dict[str, str]]]:
    """Return a row as text, the way TRL reads it: a prompt, and responses named chosen and rejected."""
    names = ("chosen", "rejected")
    answers = {
        name: [{"role": "assistant", "content": response.content}]
        for name, response in zip(names, row.responses, strict=False)
    }
    return {"prompt": [{"role": turn.role, "content": turn.content} for turn in row.messages], **answers}


def _dataset(bench: Workbench, rows: Sequence[Record], splits: Sequence[Split]) -> ArtifactRef:
    with tempfile.TemporaryDirectory(dir=bench.home) as scratch:
        for split in splits:
            lines = [row.model_copy(update={"split": split}).model_dump_json() for row in rows]
            (Path(scratch) / f"{split.value}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return bench.commit(Path(scratch), kind="dataset")
