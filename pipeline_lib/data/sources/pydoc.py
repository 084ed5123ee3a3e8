"""The Python standard library's own documentation, read from the running interpreter.

Each public function and class becomes a question in several phrasings with the first paragraph of
its documentation as the answer, and one comparison: the documentation of a sibling in the same
module is the rejected answer. Siblings are paired, and a pair is a group, so the text that is wrong
in one split is never the right answer of another.
"""

from __future__ import annotations

import importlib
import inspect
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline_lib.data.documentation import first_paragraph
from pipeline_lib.data.mapping import Note
from pipeline_lib.data.place import OpenPlace
from pipeline_lib.data.refusal import BadRowError, reject_raw
from pipeline_lib.data.source import Items
from pipeline_lib.hashing import derive_seed, sha256_json
from pipeline_lib.schema import Author, Message, Origin, Record, Rejection, Response
from pipeline_lib.validation import Frozen

_RULES_VERSION = 1
"""Raise when the same interpreter would give other rows."""
_NEVER = {
    "antigravity", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo",
}  # fmt: skip
"""They open windows or browsers, print, or are tests."""
_MODULE_NAMES = """
    abc argparse array ast asyncio base64 binascii bisect builtins bz2 calendar cmath cmd code
    codecs collections compileall concurrent.futures configparser contextlib copy csv ctypes
    dataclasses datetime decimal difflib dis doctest email.header email.message email.policy
    email.utils enum filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass glob
    graphlib gzip hashlib heapq hmac html html.parser http.client http.cookiejar http.cookies
    http.server imaplib importlib.abc importlib.machinery importlib.metadata importlib.resources
    importlib.util inspect io ipaddress itertools json keyword linecache locale logging
    logging.config logging.handlers lzma mailbox marshal math mimetypes mmap multiprocessing.pool
    multiprocessing.shared_memory numbers operator optparse os os.path pathlib pdb pickle
    pickletools pkgutil platform plistlib poplib pprint profile pstats py_compile pyclbr pydoc queue
    quopri random re reprlib runpy sched secrets selectors shelve shlex shutil signal site smtplib
    socket socketserver sqlite3 ssl stat statistics string struct subprocess symtable sys sysconfig
    tarfile tempfile textwrap threading time timeit token tokenize tomllib traceback tracemalloc
    types typing unicodedata unittest unittest.mock urllib.error urllib.parse urllib.request
    urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.headers wsgiref.util
    xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils xmlrpc.client zipapp zipfile zipimport
    zlib zoneinfo
"""
_MODULES = tuple(_MODULE_NAMES.split())

Kind = Literal["function", "class", "exception", "method"]
_ASK_WHAT_IT_DOES = (
    "What does `{name}` do?",
    "Explain the {kind} `{name}` from Python's standard library.",
    "What is the {kind} `{name}` used for in Python?",
    "Describe what the Python {kind} `{name}` does.",
    "I came across `{name}` in some Python code. What does it do?",
    "In Python, what does the {kind} `{name}` do?",
    "Give me a short description of Python's `{name}`.",
    "Can you tell me what Python's `{name}` is for?",
)
_ASK_WHAT_IT_IS = (
    "What is `{name}`?",
    "Explain the {kind} `{name}` from Python's standard library.",
    "What is the {kind} `{name}` used for in Python?",
    "Describe the Python {kind} `{name}`.",
    "I came across `{name}` in some Python code. What is it?",
    "In Python, what is the {kind} `{name}`?",
    "Give me a short description of Python's `{name}`.",
    "Can you tell me what Python's `{name}` is for?",
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One documented thing: its full name, what it is, and its documentation as sentences."""

    name: str
    kind: Kind
    text: str


class Pydoc(Frozen):
    """Read the documentation of the standard library."""

    modules: tuple[str, ...] | None = None
    """Modules of the standard library; a default list of well documented ones where empty."""
    include_methods: bool = False
    """Take the public methods of classes too."""
    max_items: int | None = Field(default=None, ge=2)
    """Take so many functions and classes, chosen by hash."""
    phrasings: int = Field(default=3, ge=1, le=len(_ASK_WHAT_IT_DOES))
    """Questions asked about each."""
    seed: int = 0
    """Chooses phrasings, siblings and the items under `max_items`."""
    min_words: int = Field(default=4, ge=1)
    """Shortest answer."""
    max_words: int = Field(default=80, ge=8)
    """Longest answer; whole sentences are left out from the end."""
    label: str = "pydoc"
    """Name of the source in reports."""
    license: str = "PSF-2.0"
    """Licence of the texts."""

    @field_validator("modules")
    @classmethod
    def _standard_library_only(cls, modules: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for module in modules or ():
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names or top in _NEVER:
                raise ValueError(f"{module!r} is not a module of the standard library that is safe to import")
        return modules

    def rows(self, opener: OpenPlace, note: Note) -> Items:  # noqa: ARG002 - nothing is opened
        """Yield demonstrations and a comparison of each documented name; names without one are rejected."""
        entries: dict[str, list[_Entry]] = {}
        owner_by_text: dict[str, str] = {}
        for module, found in self._walk():
            if isinstance(found, Rejection):
                yield found
            elif found.text in owner_by_text:
                error = BadRowError("E_DUPLICATE_DOC", f"the same text as {owner_by_text[found.text]}")
                yield self._reject(error, found.name, raw=found.text)
            else:
                owner_by_text[found.text] = found.name
                entries.setdefault(module, []).append(found)
        chosen = self._chosen({entry.name for group in entries.values() for entry in group})
        note(f"{len(chosen)} documented names of {len(entries)} modules, Python {platform.python_version()}")
        for group in entries.values():
            for siblings in self._families([entry for entry in group if entry.name in chosen]):
                for index, entry in enumerate(siblings):
                    sibling = siblings[(index + 1) % len(siblings)] if len(siblings) > 1 else None
                    yield from self._records(entry, sibling, group=siblings[0].name)

    def fingerprint(self, opener: OpenPlace) -> dict[str, str]:  # noqa: ARG002 - nothing is opened
        """Return what decides the documentation: interpreter, platform and this file's rules."""
        return {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "platform": sys.platform,
            "modules": sha256_json(sorted(self.modules or _MODULES)),
            "rules": str(_RULES_VERSION),
        }

    def _walk(self) -> Iterator[tuple[str, _Entry | Rejection]]:
        for name in sorted(set(self.modules or _MODULES)):
            module = _import(name)
            if module is None:
                error = BadRowError("E_NO_MODULE", "the module is not there on this machine")
                yield name, self._reject(error, name)
                continue
            for qualified, kind, value in _public_names(module, name, include_methods=self.include_methods):
                try:
                    text = first_paragraph(_own_doc(value), min_words=self.min_words, max_words=self.max_words)
                    yield name, _Entry(qualified, kind, text)
                except BadRowError as error:
                    yield name, self._reject(error, qualified, raw=_own_doc(value))

    def _chosen(self, names: set[str]) -> set[str]:
        ranked = sorted(names, key=lambda name: derive_seed(self.seed, "pydoc", "item", name))
        return set(ranked[: self.max_items])

    def _families(self, entries: list[_Entry]) -> Iterator[list[_Entry]]:
        """Pair siblings by hash; of an odd number the last three are together."""
        ranked = sorted(entries, key=lambda entry: derive_seed(self.seed, "pydoc", "sibling", entry.name))
        start = 0
        while start < len(ranked):
            size = 3 if len(ranked) - start == 3 else 2
            yield ranked[start : start + size]
            start += size

    def _records(self, entry: _Entry, sibling: _Entry | None, *, group: str) -> Iterator[Record]:
        templates = _ASK_WHAT_IT_IS if entry.kind in ("class", "exception") else _ASK_WHAT_IT_DOES
        ranked = sorted(range(len(templates)), key=lambda k: derive_seed(self.seed, "pydoc", "phrasing", entry.name, k))
        shown = entry.name.removeprefix("builtins.")
        questions = [templates[k].format(name=shown, kind=entry.kind) for k in ranked[: self.phrasings]]
        origin = Origin(source=self.label, license=self.license, place=entry.name)
        answer = _documentation(entry)
        for question in questions:
            yield Record.create((_user(question),), (answer,), origin=origin, group=group)
        if sibling is not None:
            pair = (answer, _documentation(sibling))
            yield Record.create((_user(questions[0]),), pair, (1, 2), origin=origin, group=group)

    def _reject(self, error: BadRowError, name: str, *, raw: str = "") -> Rejection:
        origin = Origin(source=self.label, license=self.license, place=name)
        return reject_raw(error, origin=origin, line=None, raw=raw)


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _documentation(entry: _Entry) -> Response:
    return Response(content=entry.text, author=Author(kind="documentation", name=entry.name))


def _import(name: str) -> ModuleType | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def _public_names(module: ModuleType, name: str, *, include_methods: bool) -> Iterator[tuple[str, Kind, Any]]:
    """Yield the functions and classes that a module offers as its own, sorted by name."""
    listed = getattr(module, "__all__", None)
    for attribute in sorted(set(listed if listed is not None else dir(module))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = getattr(module, attribute, None)
        if attribute.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if listed is None and not _is_own(value, name):
            continue
        qualified = f"{name}.{attribute}"
        if not inspect.isclass(value):
            yield qualified, "function", value
            continue
        yield qualified, "exception" if issubclass(value, BaseException) else "class", value
        if include_methods:
            for method in sorted(vars(value)):
                if not method.startswith("_") and inspect.isroutine(getattr(value, method, None)):
                    yield f"{qualified}.{method}", "method", getattr(value, method)


def _is_own(value: Any, module: str) -> bool:
    """Tell whether a module without `__all__` defines a name itself, maybe through its C part."""
    home = getattr(value, "__module__", None)
    if home is None or home == module:
        return True
    return isinstance(home, str) and (home.startswith(("_", f"{module}.")) or home in ("posix", "nt", "builtins"))


def _own_doc(value: Any) -> str:
    """Return a name's own docstring; a class does not speak with its parent's words."""
    if inspect.isclass(value):
        own = vars(value).get("__doc__")
        return inspect.cleandoc(own) if isinstance(own, str) else ""
    return inspect.getdoc(value) or ""
