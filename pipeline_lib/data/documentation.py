"""Turn a docstring's first paragraph into one flowing paragraph of sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline_lib.data.refusal import BadRowError

_SIGNATURE = re.compile(r"^(?:async )?[A-Za-z_][\w.]*\s*\([^()]*(?:\([^()]*\)[^()]*)*\)")
_RESULT = re.compile(r"^\s*(?:->|=>|--|:=)\s*(?P<result>[^\s.:]+(?:[ \t][^.:\n]*)?)?(?P<end>[.:]?)")
_ROLE = re.compile(r":[a-z:+-]+:`~?([^`]+)`")
_LITERAL = re.compile(r"``([^`]+)``")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([A-Za-z_][\w ,]*?)\*{1,2}(?![\w*])")
_FOOTNOTE = re.compile(r"\s*\[\d+\]_")
_LIST_LINE = re.compile(r"^\s*(?:[-*•+]\s|\d+[.)]\s|:\w+|@\w+|\|)")
_FIELD_LINE = re.compile(
    r"^\s*\**\w+\**\s*(?:--|:\s{2,}|\s{2,}[-=:])"  # name -- meaning
    r"|^\s*['\w, ]{1,40}\s--\s"
    r"|^\s*[\"'\w. ]{1,24} ->\s"
    r"|^\s*\w+ = "
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]`]*\s+(?=[A-Z`\"'(])")
_ABBREVIATION = re.compile(r"(?:\be\.g|\bi\.e|\betc|\bcf|\bvs|\bvol|\bno|\bsec|\bp)\.$", re.IGNORECASE)
_MACHINE_TALK = re.compile(
    r"help\(type|initialize self|see class docstring|^alias(es)? (for|of)\b|for internal use|"
    r"\bTODO\b|\bXXX\b|^deprecated\b|^see (also )?\b|^undocumented|^like\b|not documented|all arguments are optional|"
    r"^helper for\b|^internal\b(?! error)|this class is deprecated",
    re.IGNORECASE,
)
_MAX_SYMBOL_FRAC = 0.12


def first_paragraph(docstring: str, *, min_words: int, max_words: int) -> str:
    """Return a docstring's first paragraph as sentences, without signature, markup and examples.

    Where it has fewer than `min_words` words, the paragraphs behind it join it.

    Args:
        docstring: As `inspect.getdoc` gives it.
        min_words: Fewer words are no explanation.
        max_words: Sentences beyond this many words are left out, from the end.

    Raises:
        BadRowError: `E_NO_SENTENCE`, `E_SHORT_DOC`, `E_LONG_DOC` or `E_MACHINE_TALK`.
    """
    text = ""
    for paragraph in _prose(docstring):
        text = f"{text} {_capitalised(_ended(_unmarked(paragraph)))}".strip()
        if len(text.split()) >= min_words:
            break
    words = text.split()
    if not words:
        raise BadRowError("E_NO_SENTENCE", "the docstring begins with no prose")
    if len(words) < min_words:
        raise BadRowError("E_SHORT_DOC", f"{len(words)} words, at least {min_words} are wanted")
    if _MACHINE_TALK.search(text):
        raise BadRowError("E_MACHINE_TALK", "the text points elsewhere or speaks to maintainers")
    if " -> " in text or not re.match(r"[A-Z0-9\"'`(]", text) or _symbol_frac(text) > _MAX_SYMBOL_FRAC:
        raise BadRowError("E_NO_SENTENCE", "the text is code or a table rather than sentences")
    if len(words) > max_words:
        text = _shortened(text, max_words)
    return text


def _prose(docstring: str) -> Iterator[str]:
    """Yield the paragraphs behind the signature, up to the first example, list or table."""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        lines = _without_signatures(paragraph.splitlines())
        kept: list[str] = []
        for line in lines:
            if line.lstrip().startswith((">>>", "::", "..")) or _LIST_LINE.match(line) or _FIELD_LINE.match(line):
                break
            if kept and _indent(line) > _indent(kept[-1]) + 3:
                break  # an indented block: code, or a table of options
            kept.append(line)
        text = " ".join(" ".join(kept).split())
        if text:
            yield text
        if len(kept) < len(lines):
            return


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _without_signatures(lines: list[str]) -> list[str]:
    """Drop `name(arguments) -> result` from the start of a paragraph; text behind it stays."""
    rest = list(lines)
    while rest:
        match = _SIGNATURE.match(rest[0])
        if match is None:
            return rest
        after = rest[0][match.end() :]
        result = _RESULT.match(after)
        if result is not None:
            after = after[result.end() :] if result.group("end") else ""
        elif after[:1] not in ("", ":", ".", ",") and after.strip():
            return rest  # a sentence that begins with a call, e.g. `fork() is ...`
        after = after.lstrip(" .:,-–")
        if after:
            return [after, *rest[1:]]
        rest = rest[1:]
    return rest


def _unmarked(text: str) -> str:
    text = _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", text))
    return _FOOTNOTE.sub("", _EMPHASIS.sub(r"\1", text)).strip(" \\")


def _ended(text: str) -> str:
    """End the text with a full stop; a last clause that announces a list goes."""
    if text.endswith((":", ";", ",", "...")):
        sentences = _sentences(text)[:-1]
        if not sentences:
            raise BadRowError("E_NO_SENTENCE", "the only sentence announces a list or an example")
        text = " ".join(sentences)
    return text if text.endswith((".", "!", "?", '."', ".)", "!)", "?)", ".'")) else text + "."


def _capitalised(text: str) -> str:
    first = text.split(maxsplit=1)[0]
    return text[0].upper() + text[1:] if first.isalpha() and first.islower() and len(first) > 1 else text


def _sentences(text: str) -> list[str]:
    pieces: list[str] = []
    for piece in _SENTENCE_END.split(text):
        if pieces and _ABBREVIATION.search(pieces[-1]):
            pieces[-1] += " " + piece
        else:
            pieces.append(piece)
    return pieces


def _shortened(text: str, max_words: int) -> str:
    kept: list[str] = []
    for sentence in _sentences(text):
        if sum(len(piece.split()) for piece in [*kept, sentence]) > max_words:
            break
        kept.append(sentence)
    if not kept:
        raise BadRowError("E_LONG_DOC", f"the first sentence has more than {max_words} words")
    return " ".join(kept)


def _symbol_frac(text: str) -> float:
    symbols = sum(not (char.isalnum() or char.isspace() or char in ".,;:'\"`()-_/") for char in text)
    return symbols / len(text)
