"""Stage `collect`: read every source into records, and keep what could not be read with its reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field, field_validator

from pipeline_lib.data.dedup import describe_place
from pipeline_lib.data.funnel import Tally, check_conservation, nothing_left
from pipeline_lib.data.place import OpenPlace
from pipeline_lib.data.record_files import row_line, write_json
from pipeline_lib.data.source import Source
from pipeline_lib.data.sources import SOURCES
from pipeline_lib.errors import ConfigError
from pipeline_lib.registry import PluginSpec
from pipeline_lib.schema import FunnelStep, Rejection
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.places import open_places
from pipeline_lib.validation import Frozen

VERSION = 1

_PROGRESS_EVERY_ROWS = 500


class CollectConfig(Frozen):
    """Where rows come from."""

    sources: tuple[PluginSpec, ...] = Field(({"name": "pydoc"},), min_length=1, validate_default=True)
    """Sources, in order: `{name: pydoc | jsonl | parquet | hugging_face, ...parameters}`."""
    max_rows: int | None = Field(None, ge=1)
    """Stop after so many accepted rows; null reads everything."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """What the sources held when the run was planned; filled in by the program."""

    @field_validator("sources")
    @classmethod
    def _complete(cls, specs: tuple[PluginSpec, ...]) -> tuple[PluginSpec, ...]:
        """Check each source and write its defaults out, so that the stage key sees them."""
        complete = []
        for spec in specs:
            try:
                complete.append(SOURCES.complete(spec))
            except ConfigError as error:
                raise ValueError(error.cause) from error
        return tuple(complete)


def source_fingerprints(config: CollectConfig, opener: OpenPlace) -> dict[str, str]:
    """Return what the sources hold beyond their parameters, e.g. `{"0/jsonl/data/hh.jsonl": sha256}`.

    Belongs into the stage key: a changed file, interpreter or data set makes another result.

    Raises:
        DataError: A source is not there.
    """
    return {
        f"{index}/{spec['name']}/{what}": value
        for index, spec in enumerate(config.sources)
        for what, value in sorted(SOURCES.build(spec).fingerprint(opener).items())
    }


def pin_sources(config: CollectConfig, opener: OpenPlace) -> CollectConfig:
    """Return the configuration with the fingerprints of its sources, ready for the stage key."""
    return config.model_copy(update={"fingerprints": source_fingerprints(config, opener)})


@dataclass
class _SourceCount:
    """What came out of one source."""

    tally: Tally
    kinds: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the counts for `summary.json`."""
        step = self.tally.step()
        return {
            "source": self.tally.name, "rows": step.rows_in, "accepted": step.rows_kept,
            "rejected": step.rejected, "kinds": dict(sorted(self.kinds.items())), "notes": self.notes,
        }  # fmt: skip


def run(config: CollectConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Read every source; no input, output kind `rows`.

    Writes `records.jsonl` (in the order of reading, which is always the same), `rejections.jsonl`,
    `funnel.json` and `summary.json`.

    Raises:
        DataError: A source is missing or nothing of it can be used.
    """
    assert not inputs
    opener = open_places(context.store)
    counts: list[_SourceCount] = []
    with (
        (context.workdir / "records.jsonl").open("wb") as records,
        (context.workdir / "rejections.jsonl").open("wb") as rejections,
    ):
        for index, spec in enumerate(config.sources):
            source: Source = SOURCES.build(spec)
            left = None if config.max_rows is None else config.max_rows - _num_kept(counts)
            if left == 0:
                break
            context.progress(index / len(config.sources), f"reading {spec['name']}")
            count = _SourceCount(Tally(f"{index + 1} {source.label or spec['name']}"))
            _read(source, opener, count, records, rejections, left=left, context=context)
            counts.append(count)
            if count.tally.num_kept == 0:
                raise _useless(spec, count)
    return _finish(counts, context.workdir)


def _num_kept(counts: list[_SourceCount]) -> int:
    return sum(count.tally.num_kept for count in counts)


def _read(
    source: Source, opener: OpenPlace, count: _SourceCount, records: BinaryIO, rejections: BinaryIO,
    *, left: int | None, context: StageContext,
) -> None:  # fmt: skip
    for num_rows, row in enumerate(source.rows(opener, count.notes.append), start=1):
        if isinstance(row, Rejection):
            rejections.write(row_line(row))
            count.tally.reject(row.code, f"{describe_place(row.origin)}: {row.reason}")
        else:
            records.write(row_line(row))
            count.kinds[row.kind] += 1
            count.tally.keep()
        if num_rows % _PROGRESS_EVERY_ROWS == 0:
            context.progress(0.5, f"{count.tally.name}: {num_rows} rows")
        if count.tally.num_kept == left:
            break
    for note in count.notes:
        context.log(f"{count.tally.name}: {note}")


def _useless(spec: PluginSpec, count: _SourceCount) -> Exception:
    place = spec.get("path")
    where = f" {place if isinstance(place, str) else ', '.join(place)}" if place else ""
    return nothing_left(
        f"source {count.tally.name}{where}",
        [count.tally],
        next_step="correct the file, or name its `layout` and `fields` in the source's configuration",
    )


def _finish(counts: list[_SourceCount], workdir: Path) -> StageOutput:
    steps: list[FunnelStep] = [count.tally.step() for count in counts]
    for step in steps:
        check_conservation([step])
    kinds: Counter[str] = sum((count.kinds for count in counts), Counter())
    num_kept, num_in = _num_kept(counts), sum(step.rows_in for step in steps)
    write_json(workdir / "funnel.json", [step.model_dump(mode="json") for step in steps])
    summary = {
        "rows": num_in, "accepted": num_kept, "kinds": dict(sorted(kinds.items())),
        "sources": [count.summary() for count in counts],
    }  # fmt: skip
    write_json(workdir / "summary.json", summary)
    metrics: dict[str, float | None] = {
        "rows": float(num_in), "accepted": float(num_kept), "rejected": float(num_in - num_kept),
    }  # fmt: skip
    return StageOutput("rows", workdir, metrics)
