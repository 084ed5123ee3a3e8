"""Comparisons as texts of Chain of Hindsight: one sequence a kind, its answers counted, all else not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline_lib.schema import Message, Record
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.conditions import HindsightSettings, hindsight_template, marked_template
from pipeline_lib.text.encode import Encoder, Tree, extension, place_of


def hindsight_chat(chat: ChatTokenizer, settings: HindsightSettings, marker: str) -> ChatTokenizer:
    """Return the tokenizer whose template puts a marker before every answer."""
    if settings.layout == "chat":
        return chat.with_template(marked_template(str(chat.tokenizer.chat_template), marker))
    template = hindsight_template(user_marker=settings.user_marker, marker=marker, with_bos=chat.begins_with_bos)
    return chat.with_template(template)


@dataclass(frozen=True)
class _Answer:
    """One answer of a text, and the encoder that puts its marker before it."""

    encoder: Encoder
    content: str


@dataclass(frozen=True)
class HindsightEncoder:
    """Makes the texts of a comparison, with one pair of markers after the other."""

    plain: Encoder
    settings: HindsightSettings
    marked: tuple[tuple[Encoder, Encoder], ...]
    """For each pair of markers: the encoders of better and of worse answers."""

    @classmethod
    def of(cls, encoder: Encoder, settings: HindsightSettings) -> HindsightEncoder:
        """Prepare the templates of all markers.

        Args:
            encoder: The model's own tokenizer and length limits. In a text of two answers the limits
                hold for each prompt and each answer, so the text may be twice as long.
            settings: Markers, kinds and layout.
        """
        marked = [
            tuple(replace(encoder, chat=hindsight_chat(encoder.chat, settings, marker)) for marker in pair)
            for pair in settings.markers
        ]
        return cls(encoder, settings, tuple((good, bad) for good, bad in marked))

    @property
    def chat(self) -> ChatTokenizer:
        """The tokenizer whose template conditions on the good marker: the trained model's own."""
        return self.marked[0][0].chat

    def trees(self, record: Record) -> list[Tree]:
        """Encode a comparison: for every pair of markers and of answers, one tree a kind.

        Everything before the last answer is the tree's prompt, in which an earlier answer counts.
        Assistant turns of the conversation itself stand behind the marker too, and count.
        """
        trees: dict[str, Tree] = {}
        for number, (good, bad) in enumerate(self.marked):
            for better, worse in self._pairs(record):
                answers = {
                    "p": (better, _Answer(good, record.responses[better].content)),
                    "n": (worse, _Answer(bad, record.responses[worse].content)),
                }
                for kind in self.settings.kinds:
                    # A response that is in several pairs makes a text of its own only once.
                    name = f"{record.id}:{kind}{number}:{'-'.join(str(answers[part][0]) for part in kind)}"
                    if name not in trees:
                        trees[name] = self._tree(record, name, [answers[part][1] for part in kind])
        return list(trees.values())

    def _pairs(self, record: Record) -> list[tuple[int, int]]:
        """Return the places of (better, worse) responses; none where all are tied, or one is alone."""
        ranks = record.ranks
        if self.settings.pairs == "all":
            return [(i, j) for i, one in enumerate(ranks) for j, other in enumerate(ranks) if one < other]
        if len(set(ranks)) < 2:
            return []
        return [(ranks.index(min(ranks)), ranks.index(max(ranks)))]

    def _tree(self, record: Record, name: str, answers: Sequence[_Answer]) -> Tree:
        where = place_of(record)
        ids: list[int] = []
        counts: list[bool] = []
        for index, answer in enumerate(answers):
            if index == 0 or self.settings.repeat_prompt:
                prompt_ids, prompt_counts = answer.encoder.prompt(record.messages, where=where)
                if index > 0 and self._begins(prompt_ids, answer.encoder.chat):
                    prompt_ids, prompt_counts = prompt_ids[1:], prompt_counts[1:]
            else:
                prompt_ids = self._header(answer.encoder.chat, record.messages, where=where)
                prompt_counts = [False] * len(prompt_ids)
            response = answer.encoder.response(answer.content, where=where)
            ids += prompt_ids
            counts += prompt_counts
            if index < len(answers) - 1:
                tail = self._tail(answer, record.messages, where=where)
                ids += [*response, *tail]
                counts += [True] * len(response) + [False] * len(tail)
        eos_id = self.plain.chat.eos_id
        if self.settings.double_eos and response[-1] == eos_id:
            response = [*response, eos_id]
        return Tree(name, tuple(ids), (tuple(response),), tuple(counts), weight=record.weight, group=record.group)

    def _begins(self, prompt_ids: Sequence[int], chat: ChatTokenizer) -> bool:
        """Tell whether a prompt opens a text; a token that opens each turn, as SmolLM's, does not open the text."""
        return chat.begins_with_bos and prompt_ids[:1] == [chat.tokenizer.bos_token_id]

    def _header(self, chat: ChatTokenizer, messages: tuple[Message, ...], *, where: str) -> list[int]:
        """Encode what opens a second answer to the same prompt."""
        without = chat.render(messages, add_generation_prompt=False)
        opened = chat.render(messages, add_generation_prompt=True)
        return chat.ids(extension(without, opened, where=where).lstrip(" "))

    def _tail(self, answer: _Answer, messages: tuple[Message, ...], *, where: str) -> list[int]:
        """Encode what the template puts after an answer's end-of-turn token, e.g. a line end."""
        chat = answer.encoder.chat
        said = (*messages, Message(role="assistant", content=answer.content))
        opened = chat.render(messages, add_generation_prompt=True)
        turn = chat.ids(extension(opened, chat.render(said, add_generation_prompt=False), where=where))
        return turn[turn.index(chat.eos_id) + 1 :] if chat.eos_id in turn else []
