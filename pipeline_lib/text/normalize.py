"""Normalise text: for storing (lossless for readers) and for comparing (equal where people see equal).

Nothing here imports a tokenizer or torch: collection and filtering run on small machines.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_ANSI = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)|[@-Z\\\\^_])")
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ZERO_WIDTH = re.compile("[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2064\u206a-\u206f\ufeff]")
_LONE_JOINER = re.compile("(?:(?<![^\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f]))")
# Tag characters are meant only in the flags of regions: a black flag, letters, and the cancel tag.
_TAGS = re.compile("(\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f)|[\U000e0000-\U000e007f]")
_COMBINING_RUN = 16
_PLAIN = re.compile(
    "[\t\n -~\xa0-\xac\xae-\u02ff\u0370-\u0482\u048a-\u058f"
    "\u2010-\u2027\u2030-\u205e\u20a0-\u20cf\u3001-\u3029\u309b-\u9fff\uac00-\ud7a3]*"
)
"""Characters that none of the removing rules touch; most text is made of them alone."""


def unify_line_ends(text: str) -> str:
    r"""Write every line end, the Unicode ones included, as `\n`."""
    return _LINE_ENDS.sub("\n", text)


def strip_controls(text: str) -> str:
    """Remove terminal escape sequences and control characters; tabs and line feeds stay."""
    return _CONTROLS.sub("", _ANSI.sub("", text))


def strip_bidi(text: str) -> str:
    """Remove the characters that change the direction in which text is shown."""
    return _BIDI.sub("", text)


def strip_zero_width(text: str) -> str:
    """Remove characters of no width; joiners stay inside emoji and non-Latin words, which need them."""
    return _LONE_JOINER.sub("", _ZERO_WIDTH.sub("", text))


def strip_tags(text: str) -> str:
    """Remove invisible tag characters, which can hide a second text; flag emoji stay whole."""
    return _TAGS.sub(lambda match: match.group(1) or "", text)


def has_lone_surrogate(text: str) -> bool:
    """Tell whether the text holds half a character, which no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def has_zalgo(text: str) -> bool:
    """Tell whether marks are stacked on one letter beyond anything a script needs (ten at most)."""
    return not _is_plain(text) and _stacked_marks().search(text) is not None


def normalise(text: str) -> str:
    """Apply every rule above and NFC: the form in which text is stored and trained on.

    Idempotent. NFC comes first, since it turns some characters into ASCII ones, beside which
    joiners go; and last, since a removed character can bring together two that compose.
    """
    if _is_plain(text):
        return unicodedata.normalize("NFC", text)
    plain = strip_controls(unify_line_ends(unicodedata.normalize("NFC", text)))
    return unicodedata.normalize("NFC", strip_zero_width(strip_tags(strip_bidi(plain))))


def comparison_key(text: str) -> str:
    """Return the form in which two texts are compared: two equal keys are one text to a person.

    Invisible characters go, compatibility forms (full width, ligatures) and case are folded, runs
    of white space become one space.
    """
    folded = unicodedata.normalize("NFKC", normalise(text)).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _is_plain(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None


@cache
def _stacked_marks() -> re.Pattern[str]:
    """Return the pattern of too many marks in a row; built at first use, from all of Unicode."""
    marks = "".join(chr(code) for code in range(0x300, sys.maxunicode + 1) if unicodedata.combining(chr(code)))
    return re.compile(f"[{marks}]{{{_COMBINING_RUN + 1},}}")
