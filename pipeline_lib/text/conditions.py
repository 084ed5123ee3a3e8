"""Conditions in front of what the assistant says, written as chat templates.

A model that is trained on good and bad answers, each behind words that say which it is, generates
good ones behind the good words. The words are part of the chat template, in every assistant turn
and in the generation prompt. So whatever renders a prompt with the model's own template (evaluation,
serving, the command line) conditions on them without knowing it. Light: imports no tokenizer.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline_lib.validation import Frozen

CHAT_SEPARATOR = "\n"
"""Stands between a condition and the answer in the chat layout."""

Layout = Literal["chat", "plain"]
Text = Annotated[str, Field(min_length=1)]


class HindsightSettings(Frozen):
    """Chain of Hindsight: a better and a worse answer in one text, each behind a marker."""

    name: Literal["hindsight"] = "hindsight"
    kinds: tuple[Literal["p", "n", "pn", "np"], ...] = Field(("p", "n", "pn", "np"), min_length=1)
    """Texts made of a pair: the positive answer, the negative one, or both in this order."""
    layout: Layout = "chat"
    """chat: the marker opens the assistant's turn of the model's own template; plain: the paper's text form."""
    user_marker: Text = "User:"
    """Stands before what the user says, in the plain layout."""
    good_marker: Text = "A helpful answer:"
    """Stands before better answers, and before the model's own when it generates."""
    bad_marker: Text = "An unhelpful answer:"
    """Stands before worse answers."""
    auxiliary: Literal["response", "answer", "summary"] | None = None
    """Make every text with each of a dozen other marker pairs besides, worded for this kind of task."""
    repeat_prompt: bool = True
    """Repeat the whole conversation before the second answer (dialogue), or not (summaries, questions)."""
    double_eos: bool = True
    """End a text with two end-of-turn tokens, as the authors' code does when executed."""
    pairs: Literal["best_and_worst", "all"] = "best_and_worst"
    """Which pairs of a ranking of more than two are used."""

    @property
    def markers(self) -> tuple[tuple[str, str], ...]:
        """Pairs of a good and a bad marker; the first is generated from."""
        own = (self.good_marker, self.bad_marker)
        return (own, *(auxiliary_markers(self.auxiliary) if self.auxiliary else ()))

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.good_marker.strip() == self.bad_marker.strip():
            raise ValueError("good_marker and bad_marker are the same: they could not tell answers apart")
        if not any("p" in kind for kind in self.kinds):
            raise ValueError("kinds need p, pn or np: without them nothing follows the good marker")
        return self


class AnswerClass(Frozen):
    """One class of answers."""

    name: Text
    """The words that condition on it."""
    weight: float = Field(1.0, gt=0)
    """Weight of its tokens in the loss."""


class ClassSettings(Frozen):
    """Conditional behaviour cloning: answers of several classes, weighted, each behind its name."""

    name: Literal["classes"] = "classes"
    classes: tuple[AnswerClass, ...] = Field(
        (AnswerClass(name="GPT4"), AnswerClass(name="GPT3", weight=0.1)), min_length=1
    )
    """Classes of answers, the best first: the model generates from it."""
    by: Literal["rank", "author", "tag"] = "rank"
    """What an answer's class follows from: its place in a comparison, who wrote it, or the row's tags."""
    members: dict[str, str] = Field(default_factory=dict)
    """By author or tag: the class of each name, e.g. `{gpt-4: GPT4, gpt-3.5-turbo: GPT3}`."""
    layout: Layout = "plain"
    """plain: `{class} User:` and `{class} Assistant:`; chat: the class opens the assistant's turn."""
    prefix: str = "{class} {role}:"
    """Order of class and role in the plain layout."""
    separator: str = ""
    """Stands between the prefix and the text in the plain layout."""
    sequence_weight: bool = False
    """Divide a turn's weight by its length, so that every turn counts alike however long it is."""

    @field_validator("prefix")
    @classmethod
    def _has_both(cls, prefix: str) -> str:
        if prefix.count("{class}") != 1 or prefix.count("{role}") != 1:
            raise ValueError("it holds {class} once and {role} once")
        return prefix

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        names = [each.name for each in self.classes]
        if len(set(names)) < len(names):
            raise ValueError("classes: two have one name")
        unknown = sorted(set(self.members.values()) - set(names))
        if unknown:
            raise ValueError(f"members: {unknown[0]!r} is none of the classes {', '.join(names)}")
        if self.by != "rank" and not self.members:
            raise ValueError(f"members: by {self.by} needs the class of each {self.by}")
        if self.by == "rank" and len(names) < 2:
            raise ValueError("classes: by rank needs two or more")
        return self


Conditioning = Annotated[HindsightSettings | ClassSettings, Field(discriminator="name")]
"""How answers are conditioned; its `name` says which."""


def auxiliary_markers(task: Literal["response", "answer", "summary"]) -> tuple[tuple[str, str], ...]:
    """Return the paper's further marker pairs for a kind of task, a statement and a request of each."""
    qualities = (("better", "worse"), ("more accurate", "less accurate"), ("more correct", "less correct"))
    nouns: tuple[str, ...] = (task,)
    if task == "response":
        qualities = (("better", "worse"), ("more helpful", "less helpful"), ("more harmless", "more harmful"))
        nouns = ("response", "chat")
    return tuple(
        (f"{opening} {good} {noun}.", f"{opening} {bad} {noun}.")
        for opening in ("The following is a", "Generate a")
        for noun in nouns
        for good, bad in qualities
    )


def marked_template(template: str, marker: str) -> str:
    """Return a chat template whose assistant turns, the generation prompt's too, open with a marker.

    The given template is kept word for word: it is shown turns that hold the marker already.

    Args:
        template: Any chat template in Jinja.
        marker: The words, without the separator that follows them.
    """
    marked = _literal(marker + CHAT_SEPARATOR)
    # `set` with a dash and the empty expression keep the block trimming of templates off the given text.
    return (
        "{%- set marked = namespace(turns=[]) -%}"
        "{%- for turn in messages -%}"
        "{%- if turn['role'] == 'assistant' -%}"
        f"{{%- set marked.turns = marked.turns + [dict(turn, content={marked} + turn['content'])] -%}}"
        "{%- else -%}{%- set marked.turns = marked.turns + [turn] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set messages = marked.turns -%}{{- '' }}"
        + template.removesuffix("\n")
        + f"{{{{ {marked} if add_generation_prompt else '' }}}}"
    )


def hindsight_template(*, user_marker: str, marker: str, with_bos: bool) -> str:
    """Return the plain template of Chain of Hindsight: markers and texts joined by single spaces.

    The answer follows its marker at once, as separately encoded texts do in the authors' code.
    """
    user, assistant = _literal(user_marker + " "), _literal(" " + marker)
    return (
        _bos(with_bos) + "{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}{{{{ {user} + message['content'] }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {assistant} + message['content'] + eos_token }}}}"
        "{% else %}{{ message['content'] + ' ' }}{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
    )


def class_template(settings: ClassSettings, name: str, *, with_bos: bool) -> str:
    """Return the plain template of conditional behaviour cloning for one class.

    Every turn is its prefix, its text and the end-of-turn token; a system turn has no prefix.
    """
    prefixes = {
        role: _literal(settings.prefix.replace("{class}", name).replace("{role}", word) + settings.separator)
        for role, word in (("user", "User"), ("assistant", "Assistant"))
    }
    return (
        _bos(with_bos) + "{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}{{{{ {prefixes['user']} }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {prefixes['assistant']} }}}}{{% endif %}}"
        "{{ message['content'] + eos_token }}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {prefixes['assistant']} }}}}{{% endif %}}"
    )


def _bos(with_bos: bool) -> str:
    return "{{ bos_token }}" if with_bos else ""


def _literal(text: str) -> str:
    """Write text as a Jinja string; characters outside ASCII stay, since Jinja knows no surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
