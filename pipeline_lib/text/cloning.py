"""Answers of several classes as weighted rows of conditional behaviour cloning."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline_lib.schema import Record
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.conditions import AnswerClass, ClassSettings, class_template, marked_template
from pipeline_lib.text.encode import Encoder, Tree, place_of


def class_chat(chat: ChatTokenizer, settings: ClassSettings, name: str) -> ChatTokenizer:
    """Return the tokenizer whose template conditions on a class."""
    if settings.layout == "chat":
        return chat.with_template(marked_template(str(chat.tokenizer.chat_template), name))
    return chat.with_template(class_template(settings, name, with_bos=chat.begins_with_bos))


@dataclass(frozen=True)
class ClassEncoder:
    """Makes one row of every answer whose class is known."""

    settings: ClassSettings
    encoders: tuple[Encoder, ...]
    """One a class, in their order."""

    @classmethod
    def of(cls, encoder: Encoder, settings: ClassSettings) -> ClassEncoder:
        """Prepare the templates of all classes.

        Args:
            encoder: The model's own tokenizer and length limits.
            settings: Classes, layout, and what an answer's class follows from.
        """
        encoders = [replace(encoder, chat=class_chat(encoder.chat, settings, each.name)) for each in settings.classes]
        return cls(settings, tuple(encoders))

    @property
    def chat(self) -> ChatTokenizer:
        """The tokenizer whose template conditions on the best class: the trained model's own."""
        return self.encoders[0].chat

    def trees(self, record: Record) -> list[Tree]:
        """Encode a row's answers, each behind its class and with its weight; none where no class is known.

        Earlier assistant turns count where the row has one answer; before several they are a prompt.
        A text ends with its last answer, so nothing of no weight trails it.
        """
        where = place_of(record)
        trees = []
        for place, response in enumerate(record.responses):
            number = self._class_of(record, place)
            if number is None:
                continue
            encoder = self.encoders[number]
            prompt_ids, counts = encoder.prompt(record.messages, where=where)
            if len(record.responses) > 1:
                counts = [False] * len(prompt_ids)
            ids = tuple(encoder.response(response.content, where=where))
            weight = self.settings.classes[number].weight * record.weight
            name = f"{record.id}:{place}"
            trees.append(Tree(name, tuple(prompt_ids), (ids,), tuple(counts), weight=weight, group=record.group))
        return trees

    def _class_of(self, record: Record, place: int) -> int | None:
        """Return the number of an answer's class; None where nothing tells it."""
        last = len(self.settings.classes) - 1
        if self.settings.by == "rank":
            if record.desirable is not None:
                return 0 if record.desirable else last
            if len(set(record.ranks)) < 2:
                return None  # nothing but ties, or no comparison at all, says nothing
            return min(sorted(set(record.ranks)).index(record.ranks[place]), last)
        author = record.responses[place].author
        words = (author.name, author.kind) if self.settings.by == "author" else record.tags
        named = [self.settings.members[word] for word in words if word in self.settings.members]
        return self._number(named[0]) if named else None

    def _number(self, name: str) -> int:
        classes: tuple[AnswerClass, ...] = self.settings.classes
        return [each.name for each in classes].index(name)
