"""Records into token ids: the prompt once, then each response, with what counts in the loss.

The prompt is the rendered template up to and including the assistant's header; a response is its
text and the end-of-turn token. Both are tokenised apart, so a prompt has the same ids when it is
trained on and when it is generated from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from pipeline_lib.errors import DataError
from pipeline_lib.schema import Message, Record
from pipeline_lib.text.chat_template import ChatTokenizer


@dataclass(frozen=True)
class Tree:
    """A prompt and its K responses as token ids: the unit that batches are packed from."""

    record_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[tuple[int, ...], ...]
    """One tuple a response, ending with the end-of-turn token unless it was cut."""
    prompt_counts: tuple[bool, ...]
    """True where a prompt token counts in the SFT loss: earlier turns of a demonstration."""
    weight: float = 1.0
    """How much the counted tokens of the tree weigh in a cross-entropy; other objectives have their own."""
    group: str = ""
    """Trees of one group are held out together; empty: those of one prompt."""

    @property
    def num_tokens(self) -> int:
        """Tokens the tree occupies in a batch: the prompt once, and every response."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)

    @property
    def counted_turns(self) -> tuple[int, ...]:
        """Counted tokens of each turn: of earlier ones that count, then of every response.

        The first token of a text is predicted from nothing, so it never counts.
        """
        runs = groupby(self.prompt_counts[1:])
        earlier = [sum(1 for _ in run) for counts, run in runs if counts]
        return (*earlier, *(len(ids) for ids in self.response_ids if ids))


@dataclass(frozen=True)
class Encoder:
    """Encodes records with one tokenizer and one set of length limits."""

    chat: ChatTokenizer
    max_prompt_tokens: int
    max_response_tokens: int

    def prompt(self, messages: tuple[Message, ...], *, where: str) -> tuple[list[int], list[bool]]:
        """Encode a prompt; cut from the left where it is too long.

        Args:
            messages: The dialogue, ending with a user turn.
            where: The row, for messages.

        Returns:
            Token ids, and True where a token belongs to an earlier assistant turn (its text and
            its end-of-turn token, never its header).

        Raises:
            DataError: A turn holds a control string, or the template rewrites earlier turns.
        """
        ids: list[int] = []
        counts: list[bool] = []
        rendered = ""
        for index, message in enumerate(messages):
            self.chat.refuse_control_strings(message.content, where=where)
            if message.role != "assistant":
                continue
            header = self.chat.render(messages[:index], add_generation_prompt=True)
            closed = self.chat.render(messages[: index + 1], add_generation_prompt=False)
            self._append(ids, counts, extension(rendered, header, where=where), counted=False)
            turn = extension(header, closed, where=where)
            turn_ids = self.chat.ids(turn)
            end = turn_ids.index(self.chat.eos_id) + 1 if self.chat.eos_id in turn_ids else len(turn_ids)
            ids += turn_ids
            counts += [True] * end + [False] * (len(turn_ids) - end)
            rendered = closed
        whole = self.chat.render(messages, add_generation_prompt=True)
        self._append(ids, counts, extension(rendered, whole, where=where), counted=False)
        return ids[-self.max_prompt_tokens :], counts[-self.max_prompt_tokens :]

    def response(self, content: str, *, where: str) -> list[int]:
        """Encode a response: its text, then one end-of-turn token; cut at the limit without one.

        Raises:
            DataError: The text holds a control string.
        """
        self.chat.refuse_control_strings(content, where=where)
        return [*self.chat.ids(content), self.chat.eos_id][: self.max_response_tokens]

    def tree(self, record: Record) -> Tree:
        """Encode a record: its prompt and all its responses in their order.

        Earlier assistant turns count only in a demonstration: where responses are compared, or none
        is there, the dialogue before them is a prompt like any other.
        """
        where = place_of(record)
        prompt_ids, counts = self.prompt(record.messages, where=where)
        responses = tuple(tuple(self.response(response.content, where=where)) for response in record.responses)
        if len(responses) != 1:
            counts = [False] * len(prompt_ids)
        return Tree(record.id, tuple(prompt_ids), responses, tuple(counts))

    def _append(self, ids: list[int], counts: list[bool], text: str, *, counted: bool) -> None:
        new_ids = self.chat.ids(text)
        ids += new_ids
        counts += [counted] * len(new_ids)


def place_of(record: Record) -> str:
    """Name a row and where it came from, for messages."""
    return f"row {record.id[:12]} ({record.origin.place or record.origin.source}:{record.origin.line or 0})"


def extension(start: str, whole: str, *, where: str) -> str:
    """Return what a rendered dialogue has after its beginning.

    Raises:
        DataError: It does not begin so: the template rewrites earlier turns.
    """
    if not whole.startswith(start):
        raise DataError(
            f"{where}: the chat template changes earlier turns when later ones are added",
            next_step="use a chat template that only appends, or rows of a single turn",
        )
    return whole[len(start) :]
