"""Pretraining text for a training stage: its files pinned when a run is planned, and read into trees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from pipeline_lib.data.place import OpenPlace, expand, fingerprint, shown_place
from pipeline_lib.data.read import ReadLimits, read_jsonl
from pipeline_lib.errors import DataError
from pipeline_lib.hashing import sha256_json
from pipeline_lib.schema import Origin, Rejection
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.stages.places import open_places
from pipeline_lib.text.normalize import normalise
from pipeline_lib.training.pretraining_settings import PretrainingSettings
from pipeline_lib.training.settings import TrainingSettings

if TYPE_CHECKING:
    from pipeline_lib.text.chat_template import ChatTokenizer
    from pipeline_lib.text.encode import Tree
    from pipeline_lib.training.pretraining import PretrainingRows

_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")

ConfigT = TypeVar("ConfigT", bound=TrainingSettings)


def pin_pretraining(config: ConfigT, opener: OpenPlace) -> ConfigT:
    """Return a stage's configuration with the sha256 of its pretraining files, ready for the stage key.

    A configuration without pretraining text comes back as it is.

    Raises:
        DataError: A file is not there.
    """
    settings = getattr(config, "pretraining", None)
    if settings is None:
        return config
    pinned = settings.model_copy(update={"fingerprints": _fingerprints(settings, opener)})
    return config.model_copy(update={"pretraining": pinned})


def load_pretraining(
    settings: PretrainingSettings | None, chat: ChatTokenizer, context: StageContext, *, seed: int
) -> PretrainingRows | None:
    """Read and encode a stage's pretraining text; None where it has none.

    Raises:
        DataError: The files are not those that the run was planned with, or hold no usable text.
    """
    from pipeline_lib.training.pretraining import PretrainingRows  # noqa: PLC0415  (torch)

    if settings is None:
        return None
    opener = open_places(context.store)
    if _fingerprints(settings, opener) != settings.fingerprints:
        raise DataError(
            f"pretraining text {', '.join(settings.paths)} is not what it was when the run was planned",
            next_step="run again: the run is planned anew with the files as they are",
        )
    refused: Counter[str] = Counter()
    trees = [tree for text in _texts(settings, opener, refused) for tree in text_trees(text, chat, settings, refused)]
    for code, count in sorted(refused.items()):
        context.log(f"pretraining text: {code} refused {count} rows")
    if not trees:
        raise DataError(
            f"pretraining text {', '.join(settings.paths)}: no row has a usable {settings.field!r}",
            next_step='give JSONL files with rows {"text": "..."}, or name the field as pretraining.field',
        )
    return PretrainingRows(tuple(trees), settings.coef, settings.rows_per_step, seed)


def text_trees(text: str, chat: ChatTokenizer, settings: PretrainingSettings, refused: Counter[str]) -> list[Tree]:
    """Encode a text as pieces whose every token counts.

    A piece is predicted from the token that begins texts, or else from the one that ends them; the
    last piece ends with the latter.

    Args:
        text: Plain text.
        chat: The tokenizer; its template is not used.
        settings: How long a piece is.
        refused: Counts texts that would be tokenised as control tokens, which are left out.
    """
    from pipeline_lib.text.encode import Tree  # noqa: PLC0415  (transformers)
    from pipeline_lib.training.pretraining import TEXT  # noqa: PLC0415  (torch)

    if any(control in text for control in chat.control_strings):
        refused["E_CONTROL_TOKENS"] += 1
        return []
    first = chat.tokenizer.bos_token_id if chat.begins_with_bos else chat.eos_id
    ids = [*chat.ids(text), chat.eos_id]
    name = TEXT + sha256_json(text)
    size = settings.max_tokens
    return [
        Tree(f"{name}:{start}", (int(first),), (tuple(ids[start : start + size]),), (False,))
        for start in range(0, len(ids), size)
    ]


def _texts(settings: PretrainingSettings, opener: OpenPlace, refused: Counter[str]) -> Iterator[str]:
    num_texts = 0
    for file in expand(opener, settings.paths, suffixes=_SUFFIXES):
        origin = Origin(source="pretraining", place=shown_place(file))
        with opener.open(file) as stream:
            for row in read_jsonl(stream, origin=origin, limits=ReadLimits()):
                value = None if isinstance(row, Rejection) else row.values.get(settings.field)
                if isinstance(row, Rejection) or not isinstance(value, str) or not value.strip():
                    refused[row.code if isinstance(row, Rejection) else "E_MISSING_FIELD"] += 1
                    continue
                yield normalise(value)
                num_texts += 1
                if num_texts == settings.max_texts:
                    return


def _fingerprints(settings: PretrainingSettings, opener: OpenPlace) -> dict[str, str]:
    files = expand(opener, settings.paths, suffixes=_SUFFIXES)
    return {shown_place(file): fingerprint(opener, file) for file in files}
