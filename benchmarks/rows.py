"""The rows that are trained on: prompts and responses cut out of the Python reference's own text.

Prompts of 40-220 tokens, responses of 20-110, both uniform, after the model's chat template. The
better response goes on with the prompt's text; the others come from elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics

from pipeline_lib.schema import Message, Origin, Record, Response
from pipeline_lib.text.encode import Encoder, Tree

PROMPT_TOKENS, RESPONSE_TOKENS = (40, 220), (20, 110)
_ASK = "Go on with this text.\n\n"
_ORIGIN = Origin(source="python-reference", license="PSF-2.0", place="pydoc_data.topics")


def records(encoder: Encoder, *, count: int, responses: int, seed: int) -> list[Record]:
    """Make rows that hold the promised lengths under an encoder's template."""
    source = _Slices(encoder, seed)
    made: dict[str, Record] = {}
    while len(made) < count:
        record = source.record(responses)
        tree = encoder.tree(record)
        if is_in_range(tree):
            made[record.id] = record
    return list(made.values())


def is_in_range(tree: Tree) -> bool:
    """Tell whether a row's prompt and responses have the lengths of the benchmark."""
    return PROMPT_TOKENS[0] <= len(tree.prompt_ids) <= PROMPT_TOKENS[1] and all(
        RESPONSE_TOKENS[0] <= len(ids) <= RESPONSE_TOKENS[1] for ids in tree.response_ids
    )


def pair_records(record: Record) -> Iterator[Record]:
    """Yield every (better, worse) pair of a comparison as a row of its own."""
    for better, rank in zip(record.responses, record.ranks, strict=True):
        for worse, other in zip(record.responses, record.ranks, strict=True):
            if rank < other:
                yield Record.create(record.messages, (better, worse), (1, 2), origin=record.origin)


class _Slices:
    """Draws slices of the reference's text, by token."""

    def __init__(self, encoder: Encoder, seed: int) -> None:
        self.encoder = encoder
        self.random = random.Random(seed)
        texts = [topics[name] for name in sorted(topics)]
        self.texts = [ids for ids in (encoder.chat.ids(text) for text in texts) if len(ids) > 2 * PROMPT_TOKENS[1]]
        template, _ = encoder.prompt((Message(role="user", content=_ASK),), where="benchmark")
        self.overhead = len(template)

    def record(self, responses: int) -> Record:
        """Draw a row; its lengths are near what was drawn, since text is tokenised anew."""
        shortest = max(PROMPT_TOKENS[0], self.overhead + 4)
        prompt_tokens = self.random.randint(shortest, PROMPT_TOKENS[1]) - self.overhead
        sizes = [self.random.randint(*RESPONSE_TOKENS) - 1 for _ in range(responses)]
        prompt, better = self._adjacent(prompt_tokens, sizes[0])
        texts = [better, *(self._adjacent(0, size)[1] for size in sizes[1:])]
        ranks = tuple(range(1, responses + 1)) if responses > 1 else ()
        messages = (Message(role="user", content=_ASK + prompt),)
        return Record.create(messages, tuple(Response(content=text) for text in texts), ranks, origin=_ORIGIN)

    def _adjacent(self, first: int, second: int) -> tuple[str, str]:
        ids: Sequence[int] = self.random.choice(self.texts)
        start = self.random.randrange(len(ids) - first - second)
        cut = start + first
        return self.encoder.chat.decode(list(ids[start:cut])), self.encoder.chat.decode(list(ids[cut : cut + second]))
