"""Stage `filter`: apply the rules, remove duplicates and contradictions, divide prompts by use."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field, field_validator

from pipeline_lib.data.decontaminate import HELD_OUT, Decontamination, HeldOutRuns
from pipeline_lib.data.dedup import (
    DedupConfig,
    RowKeys,
    describe_place,
    find_contradictions,
    find_duplicates,
    find_ties,
    row_keys,
)
from pipeline_lib.data.filters import FILTERS
from pipeline_lib.data.funnel import Tally, check_conservation, nothing_left
from pipeline_lib.data.record_files import read_records, row_line, write_json
from pipeline_lib.data.refusal import Refusal, reject_record
from pipeline_lib.data.rule import NeedsTokens, Rule, Tools, Transform
from pipeline_lib.data.split import DisjointCheck, SplitConfig, SplitKeys, assign_splits, split_keys
from pipeline_lib.data.tokens import TokenizerFile
from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.registry import PluginSpec
from pipeline_lib.schema import FunnelStep, Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.validation import Frozen

VERSION = 1

_PROGRESS_EVERY_ROWS = 2000
_TOKENIZER_FILE = "model/tokenizer.json"
_DEFAULT_RULES: tuple[PluginSpec, ...] = (
    {"name": "unicode"},
    {"name": "roles"},
    {"name": "empty"},
    {"name": "control_tokens"},
    {"name": "identical_pair"},
    {"name": "length", "max_prompt_tokens": 1024, "max_response_tokens": 1024},
    {"name": "length_ratio"},
    {"name": "repetition"},
)
_STEPS_OVER_ALL: dict[str, Callable[[Sequence[RowKeys], Iterable[int]], dict[int, Refusal]]] = {
    "duplicates": find_duplicates,
    "contradictions": find_contradictions,
    "ties": find_ties,
}
_WANTED_KIND = {
    Split.SFT: "demonstration",
    Split.REWARD: "comparison",
    Split.REWARD_TEST: "comparison",
}


_NamedRule = tuple[str, Rule, Transform | None]


class FilterConfig(Frozen):
    """Which rows are kept, and what each may be used for."""

    rules: tuple[PluginSpec, ...] = Field(_DEFAULT_RULES, validate_default=True)
    """Rules, applied to each row in this order: `{name: ..., ...parameters}`."""
    dedup: DedupConfig = DedupConfig()
    """Steps over the whole set, after the rules."""
    split: SplitConfig = SplitConfig()
    """How prompts are divided."""
    decontaminate: Decontamination | None = Field(None, title="Decontamination")
    """After dividing: refuse training rows that quote held-out ones, e.g. `{words: 13}`; null: keep them."""
    min_rows: int = Field(1, ge=1)
    """Fewest rows that each split with a fraction above 0 must get."""

    @field_validator("rules")
    @classmethod
    def _complete(cls, specs: tuple[PluginSpec, ...]) -> tuple[PluginSpec, ...]:
        """Check each rule and write its defaults out, so that the stage key sees them."""
        complete = []
        for spec in specs:
            try:
                complete.append(FILTERS.complete(spec))
            except ConfigError as error:
                raise ValueError(error.cause) from error
        return tuple(complete)


@dataclass
class _Kept:
    """What is remembered of each row that passed the rules, in order."""

    rows: list[RowKeys]
    links: list[SplitKeys]


def run(config: FilterConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Filter and divide; inputs `rows` and `base_model`, output kind `dataset`.

    Writes a file of records for each split, `rejections.jsonl`, `funnel.json` and `summary.json`.

    Raises:
        ConfigError: A rule counts tokens and there is no tokenizer to count with.
        DataError: Nothing is left, or too little for a split.
    """
    rules = [_named_rule(spec) for spec in config.rules]
    tools = _tools([rule for _, rule, _ in rules], inputs, context)
    with (
        tempfile.TemporaryDirectory(dir=context.workdir.parent) as scratch,
        (context.workdir / "rejections.jsonl").open("wb") as rejections,
    ):
        passed = Path(scratch) / "passed.jsonl"
        rows = context.store.fetch(inputs["rows"], Path(scratch), paths=["records.jsonl"])
        records = read_records(rows / "records.jsonl")
        tallies, kept = _apply_rules(records, rules, tools, config, passed, rejections, context)
        context.progress(0.6, "duplicates and contradictions")
        refused = _apply_steps_over_all(config.dedup, kept.rows, tallies)
        alive = [index for index in range(len(kept.rows)) if index not in refused]
        if not alive:
            raise nothing_left("the filtered set", tallies, next_step="relax the rules named, or collect more rows")
        context.progress(0.7, "dividing prompts")
        splits = dict(zip(alive, assign_splits([kept.links[index] for index in alive], config.split), strict=True))
        if config.decontaminate is not None:
            refused |= _contaminated(config.decontaminate, passed, splits, kept.rows, tallies)
        counts = _write_splits(passed, refused, splits, context.workdir, rejections)
    _check_sizes(counts, config)
    return _finish(tallies, counts, context.workdir)


def _named_rule(spec: PluginSpec) -> _NamedRule:
    rule: Rule = FILTERS.build(spec)
    return spec["name"], rule, rule if isinstance(rule, Transform) else None


def _tools(rules: list[Rule], inputs: Inputs, context: StageContext) -> Tools:
    """Load the base model's tokenizer, where there is one."""
    needs_tokens = any(isinstance(rule, NeedsTokens) and rule.needs_tokens for rule in rules)
    base_model = inputs.get("base_model")
    if base_model is not None and _TOKENIZER_FILE in context.store.manifest(base_model).files:
        tokenizer = TokenizerFile(context.store.open_bytes(base_model, _TOKENIZER_FILE))
        return Tools(tokenizer, tokenizer.special_tokens())
    if needs_tokens:
        raise ConfigError(
            "filter.rules: a length rule counts tokens, but the base model has no tokenizer.json",
            next_step="bound characters and words instead, or take a base model with a fast tokenizer",
        )
    return Tools()


def _apply_rules(
    records: Iterable[Record], rules: list[_NamedRule], tools: Tools, config: FilterConfig,
    passed: Path, rejections: BinaryIO, context: StageContext,
) -> tuple[list[Tally], _Kept]:  # fmt: skip
    """Judge one record after the other; write those that pass and those that do not."""
    tallies = [Tally(name) for name, _, _ in rules]
    kept = _Kept([], [])
    with passed.open("wb") as file:
        for number, record in enumerate(records, start=1):
            final = _judge(record, rules, tools, tallies, rejections)
            if final is not None:
                file.write(row_line(final))
                kept.rows.append(row_keys(final))
                kept.links.append(split_keys(final, config.split))
            if number % _PROGRESS_EVERY_ROWS == 0:
                context.progress(min(0.5, number / 200_000), f"{number} rows judged")
    return tallies, kept


def _judge(
    record: Record, rules: list[_NamedRule], tools: Tools, tallies: list[Tally], rejections: BinaryIO
) -> Record | None:
    for (name, rule, transform), tally in zip(rules, tallies, strict=True):
        refusal = rule.reject(record, tools)
        if refusal is not None:
            rejections.write(row_line(reject_record(refusal, record, stage=name)))
            tally.reject(refusal.code, f"{describe_place(record.origin)}: {refusal.reason}")
            return None
        tally.keep()
        if transform is not None:
            record = transform.transform(record)
    return record


def _apply_steps_over_all(
    config: DedupConfig, rows: list[RowKeys], tallies: list[Tally]
) -> dict[int, tuple[str, Refusal]]:
    """Return every row that a step over the whole set refuses: its step and why."""
    wanted = {
        "duplicates": config.exact,
        "contradictions": config.contradictions,
        "ties": config.ties == "drop",
    }
    refused: dict[int, tuple[str, Refusal]] = {}
    for name, find in _STEPS_OVER_ALL.items():
        if not wanted[name]:
            continue
        alive = [index for index in range(len(rows)) if index not in refused]
        found = find(rows, alive)
        tally = Tally(name)
        for index in alive:
            if index in found:
                tally.reject(found[index].code, f"{rows[index].where}: {found[index].reason}")
            else:
                tally.keep()
        refused |= {index: (name, refusal) for index, refusal in found.items()}
        tallies.append(tally)
    return refused


def _contaminated(
    config: Decontamination, passed: Path, splits: dict[int, Split], rows: list[RowKeys], tallies: list[Tally]
) -> dict[int, tuple[str, Refusal]]:
    """Return the training rows that quote held-out ones: the step's name and why."""
    runs = HeldOutRuns(config)
    for index, record in enumerate(read_records(passed)):
        if splits.get(index) in HELD_OUT:
            runs.add(record)
    name, tally, refused = "decontaminate", Tally("decontaminate"), dict[int, tuple[str, Refusal]]()
    for index, record in enumerate(read_records(passed)):
        if index not in splits:
            continue
        found = None if splits[index] in HELD_OUT else runs.refusal(record)
        if found is None:
            tally.keep()
        else:
            refused[index] = (name, found)
            tally.reject(found.code, f"{rows[index].where}: {found.reason}")
    tallies.append(tally)
    return refused


def _write_splits(
    passed: Path, refused: dict[int, tuple[str, Refusal]], splits: dict[int, Split], workdir: Path,
    rejections: BinaryIO,
) -> dict[Split, Counter[str]]:  # fmt: skip
    """Write every row into its split's file, or to the rejections; returns counts by kind."""
    counts: dict[Split, Counter[str]] = {split: Counter() for split in Split}
    check = DisjointCheck()
    files = {split: (workdir / f"{split.value}.jsonl").open("wb") for split in Split}
    try:
        for index, record in enumerate(read_records(passed)):
            if index in refused:
                name, refusal = refused[index]
                rejections.write(row_line(reject_record(refusal, record, stage=name)))
                continue
            placed = record.model_copy(update={"split": splits[index]})
            check.add(placed)
            files[splits[index]].write(row_line(placed))
            counts[splits[index]][record.kind] += 1
    finally:
        for file in files.values():
            file.close()
    return counts


def _check_sizes(counts: dict[Split, Counter[str]], config: FilterConfig) -> None:
    """Refuse a division that leaves a stage without what it needs."""
    for split, fraction in config.split.fractions.by_split().items():
        kind = _WANTED_KIND.get(split)
        found = counts[split][kind] if kind else sum(counts[split].values())
        if fraction > 0 and found < config.min_rows:
            what = f"{kind}s" if kind else "rows"
            shown = ", ".join(f"{other.value} {sum(by_kind.values())}" for other, by_kind in counts.items())
            raise DataError(
                f"the split {split.value} has {found} {what}, {config.min_rows} or more are needed ({shown})",
                next_step=f"collect more {what}, raise filter.split.fractions.{split.value}, or set it to 0 "
                "where no stage needs it",
            )


def _finish(tallies: list[Tally], counts: dict[Split, Counter[str]], workdir: Path) -> StageOutput:
    steps: list[FunnelStep] = [tally.step() for tally in tallies]
    check_conservation(steps)
    num_kept = sum(sum(by_kind.values()) for by_kind in counts.values())
    num_in = steps[0].rows_in if steps else num_kept
    assert not steps or steps[-1].rows_kept == num_kept, "a row was lost between the rules and the splits"
    rejected: Counter[str] = sum((Counter(step.rejected) for step in steps), Counter())
    write_json(workdir / "funnel.json", [step.model_dump(mode="json") for step in steps])
    by_split: dict[str, Any] = {split.value: dict(sorted(by_kind.items())) for split, by_kind in counts.items()}
    summary = {
        "rows": num_in, "kept": num_kept, "rejected": dict(sorted(rejected.items())), "splits": by_split,
    }  # fmt: skip
    write_json(workdir / "summary.json", summary)
    metrics: dict[str, float | None] = {"rows": float(num_in), "kept": float(num_kept)}
    metrics |= {f"{split.value}_rows": float(sum(by_kind.values())) for split, by_kind in counts.items()}
    return StageOutput("dataset", workdir, metrics)
