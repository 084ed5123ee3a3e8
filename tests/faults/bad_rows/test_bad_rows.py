"""The corpus of bad input: each class a file, each file an exact verdict for every row.

The bytes are made here, so that git holds no file that an editor or a scanner would change.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.schema import Rejection

GOOD = b'{"prompt": "Why is the sky blue?", "response": "Air scatters blue light most."}\n'
OK = "ok"


def row(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def pair(chosen: Any, rejected: Any, **values: Any) -> bytes:
    return row(chosen=chosen, rejected=rejected, **values)


def turns(*roles: str, last: str = "text") -> list[dict[str, str]]:
    return [{"role": role, "content": f"turn {index}"} for index, role in enumerate(roles[:-1])] + [
        {"role": roles[-1], "content": last}
    ]


HUMAN = "\n\nHuman: Hi there\n\nAssistant:"
DEEP = b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n"

# name: (bytes of the file, verdict of each row, parameters of the source)
CASES: dict[str, tuple[bytes, list[str], dict[str, Any]]] = {
    # bytes
    "no_final_newline": (GOOD + GOOD.rstrip(), [OK, OK], {}),
    "crlf": (GOOD.replace(b"\n", b"\r\n") * 2, [OK, OK], {}),
    "bom": (b"\xef\xbb\xbf" + GOOD, [OK], {}),
    "blank_lines_between": (b"\n" + GOOD + b"  \t\n\r\n" + GOOD, [OK, OK], {}),
    "utf16_with_bom": (GOOD.decode().encode("utf-16"), ["E_UTF16"], {}),
    "utf16_without_bom": (GOOD.decode().encode("utf-16-le"), ["E_UTF16"], {}),
    "latin1": (GOOD + b'{"prompt": "caf\xe9", "response": "b"}\n' + GOOD, [OK, "E_ENCODING", OK], {}),
    "overlong_utf8": (b'{"prompt": "\xc0\xaf", "response": "b"}\n' + GOOD, ["E_ENCODING", OK], {}),
    "raw_nul": (b'{"prompt": "a\0b", "response": "c"}\n' + GOOD, ["E_NUL", OK], {}),
    "escaped_nul": (b'{"prompt": "a\\u0000b", "response": "c"}\n' + GOOD, ["E_NUL", OK], {}),
    "gzip_by_content": (gzip.compress(GOOD * 2), [OK, OK], {}),
    "two_gzip_members": (gzip.compress(GOOD) + gzip.compress(GOOD), [OK, OK], {}),
    "nested_gzip": (gzip.compress(gzip.compress(GOOD)), ["E_NOT_JSONL"], {}),
    "cut_gzip": (gzip.compress(GOOD)[:-12], ["E_TRUNCATED_GZIP"], {}),
    "corrupt_gzip": (gzip.compress(GOOD)[:10] + b"\xff" * 40, ["E_CORRUPT_GZIP"], {}),
    "gzip_bomb": (gzip.compress(b" " * (40 << 20)), ["E_GZIP_BOMB"], {}),
    "zip": (b"PK\x03\x04" + b"\0" * 60, ["E_NOT_JSONL"], {}),
    "parquet_named_jsonl": (b"PAR1" + b"\0" * 60, ["E_NOT_JSONL"], {}),
    "pickle": (b"\x80\x04\x95" + b"\0" * 60, ["E_NOT_JSONL"], {}),
    # JSON
    "cut_last_row": (GOOD + GOOD[:30], [OK, "E_TRUNCATED_ROW"], {}),
    "cut_inside_a_character": (GOOD + b'{"prompt": "\xe2\x82', [OK, "E_TRUNCATED_ROW"], {}),
    "cut_row_in_the_middle": (GOOD + GOOD[:30] + b"\n" + GOOD, [OK, "E_JSON", OK], {}),
    "two_objects_on_a_line": (GOOD.strip() + b" " + GOOD, ["E_TWO_OBJECTS"], {}),
    "text_after_the_object": (GOOD.strip() + b" // why\n", ["E_JSON"], {}),
    "array": (b"[1, 2]\n" + GOOD, ["E_NOT_OBJECT", OK], {}),
    "scalars": (b'null\n"text"\n5\ntrue\n', ["E_NOT_OBJECT"] * 4, {}),
    "pretty_printed": (b'{\n "prompt": "a",\n "response": "b"\n}\n', ["E_JSON", "E_JSON", "E_JSON", "E_JSON"], {}),
    "trailing_comma": (b'{"prompt": "a", "response": "b",}\n', ["E_JSON"], {}),
    "single_quotes": (b"{'prompt': 'a'}\n", ["E_JSON"], {}),
    "nan": (b'{"prompt": "a", "response": "b", "score": NaN}\n', ["E_NON_FINITE"], {}),
    "infinity": (b'{"prompt": "a", "response": "b", "score": -Infinity}\n', ["E_NON_FINITE"], {}),
    "overflowing_float": (b'{"prompt": "a", "response": "b", "score": 1e999}\n', ["E_NON_FINITE"], {}),
    "five_thousand_digits": (
        b'{"prompt": "a", "response": "b", "n": ' + b"9" * 5000 + b"}\n", ["E_NUMBER_RANGE"], {}
    ),
    "duplicate_keys": (b'{"prompt": "a", "prompt": "b", "response": "c"}\n', ["E_DUPLICATE_KEY"], {}),
    "depth_bomb": (DEEP + GOOD, ["E_TOO_DEEP", OK], {}),
    "depth_33": (row(prompt="a", response="b", x=json.loads("[" * 32 + "]" * 32)), ["E_TOO_DEEP"], {}),
    "lone_surrogate": (b'{"prompt": "\\ud800", "response": "b"}\n' + GOOD, ["E_SURROGATE", OK], {}),
    "surrogate_pair": (b'{"prompt": "\\ud83d\\ude00", "response": "b"}\n', [OK], {}),
    "oversize_row": (
        GOOD + row(prompt="a" * 3000, response="b") + GOOD, [OK, "E_OVERSIZE_ROW", OK],
        {"limits": {"max_row_bytes": 2048}},
    ),
    "line_separators_inside": (row(prompt="a\u2028b\u0085c\u2029d", response="e"), [OK], {}),
    "raw_line_separator": ('{"prompt": "a\u2028b", "response": "c\u0085d"}\n'.encode(), [OK], {}),
    "control_character": (b'{"prompt": "a\tb", "response": "c"}\n', ["E_JSON"], {}),
    "prototype_keys": (row(prompt="a", response="b", __class__="x", constructor={"$ref": "#"}), [OK], {}),
    # types and fields
    "number_for_text": (GOOD + row(prompt=5, response="b"), [OK, "E_TYPE"], {}),
    "list_for_text": (GOOD + row(prompt="a", response=[1]), [OK, "E_TYPE"], {}),
    "null_for_text": (GOOD + row(prompt="a", response=None), [OK, "E_TYPE"], {}),
    "missing_key": (GOOD * 2 + row(prompt="a"), [OK, OK, "E_MISSING_FIELD"], {}),
    "no_known_layout": (row(x=1) + row(y=2), ["E_LAYOUT", "E_LAYOUT"], {}),
    # preferences
    "empty_prompt": (GOOD + row(prompt=" \n", response="b"), [OK, "E_EMPTY_PROMPT"], {}),
    "empty_response": (GOOD + row(prompt="a", response=""), [OK, "E_EMPTY_RESPONSE"], {}),
    "empty_rejected": (pair("a", "  ", prompt="p"), ["E_EMPTY_RESPONSE"], {}),
    "user_user": (row(messages=turns("user", "user", "assistant")), ["E_ROLE_ORDER"], {}),
    "assistant_first": (row(messages=turns("assistant", "user", "assistant")), ["E_ROLE_ORDER"], {}),
    "system_in_the_middle": (row(messages=turns("user", "system", "assistant")), ["E_SYSTEM_POSITION"], {}),
    "no_assistant": (row(messages=turns("user")), ["E_NO_ASSISTANT"], {}),
    "unknown_role": (row(messages=turns("user", "wizard")), ["E_ROLE_UNKNOWN"], {}),
    "no_messages": (row(messages=[]), ["E_EMPTY_PROMPT"], {}),
    "message_without_role": (row(messages=[{"content": "a"}]), ["E_MISSING_FIELD"], {}),
    "image_part": (
        row(messages=[{"role": "user", "content": [{"type": "image"}]}, *turns("assistant")]), ["E_TYPE"], {}
    ),
    "prompts_differ": (
        pair(turns("user", "assistant"), [{"role": "user", "content": "other"}, *turns("assistant")]),
        ["E_NO_SHARED_PROMPT"], {},
    ),
    "prompt_is_not_the_shared_one": (
        pair(turns("user", "assistant"), turns("user", "assistant", last="b"), prompt="something else"),
        ["E_PROMPT_MISMATCH"], {},
    ),
    "score_disagrees": (
        pair("a", "b", prompt="p", score_chosen=1.0, score_rejected=2.0), ["E_SCORE_ORDER"], {}
    ),
    "score_is_true": (pair("a", "b", prompt="p", score_chosen=True, score_rejected=2.0), ["E_TYPE"], {}),
    "ranks_too_few": (row(prompt="p", responses=["a", "b"], ranks=[1]), ["E_RANKS"], {}),
    "one_response": (row(prompt="p", responses=["a"], ranks=[1]), ["E_RANKS"], {}),
    "ranks_against_scores": (
        row(prompt="p", responses=["a", "b"], ranks=[1, 2], scores=[0.1, 0.9]), ["E_SCORE_ORDER"], {}
    ),
    "hh_no_speaker": (pair("hello", "you", prompt="p") + pair("x", "y"), [OK, "E_MISSING_FIELD"], {}),
    "hh_not_a_dialogue": (pair("hello", "you"), ["E_HH_FORMAT"], {"layout": "hh"}),
    "hh_goes_on": (
        pair(f"{HUMAN} a", f"{HUMAN} b\n\nHuman: more\n\nAssistant: c"), ["E_DIVERGED"], {}
    ),
    "hh_empty_answer": (pair(f"{HUMAN} a", HUMAN), ["E_EMPTY_RESPONSE"], {}),
    "group_is_a_list": (GOOD + row(prompt="a", response="b", group=[1]), [OK, "E_TYPE"], {}),
}  # fmt: skip
BINARY = bytes(range(256)) * 4


def read(path: Path, **parameters: Any) -> list[Any]:
    return list(Jsonl(path=str(path), **parameters).rows(LocalPlaces(), lambda _: None))


@pytest.mark.parametrize("name", CASES)
def test_each_row_gets_its_verdict(name: str, tmp_path: Path) -> None:
    content, verdicts, parameters = CASES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)

    rows = sorted(read(path, **parameters), key=lambda found: found.origin.line)

    assert [found.code if isinstance(found, Rejection) else OK for found in rows] == verdicts
    for found in rows:
        assert found.origin.place == str(path)
        found.model_dump_json().encode("utf-8")
        if isinstance(found, Rejection):
            assert found.reason
            assert found.stage == "read"
            assert len(found.excerpt) <= 200
            assert found.excerpt.isprintable()
            assert found.byte_offset is not None


def test_corpus_is_large_enough() -> None:
    assert len(CASES) >= 60
    codes = {code for _, verdicts, _ in CASES.values() for code in verdicts} - {OK}
    assert len(codes) >= 25


def test_binary_garbage_is_refused_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(BINARY)
    codes = {found.code for found in read(path)}
    assert codes <= {"E_NUL", "E_ENCODING", "E_JSON"}
    assert len(read(path)) == 5


def test_offset_finds_the_row_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bad = b'{"prompt": "caf\xe9", "response": "b"}'
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + bad + b"\n" + GOOD)

    (rejection,) = [found for found in read(path) if isinstance(found, Rejection)]

    assert rejection.origin.line == 3
    assert path.read_bytes()[rejection.byte_offset :].startswith(bad)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b" \n\t\n", b"\xef\xbb\xbf", gzip.compress(b"")],
    ids=["empty", "newline", "spaces", "byte_order_mark", "empty_gzip"],  # gzip's bytes hold the time of day
)
def test_nothing_is_no_row(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert read(path) == []


MEMORY_PROGRAM = """
import sys
from pathlib import Path
from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.sources.jsonl import Jsonl
codes = [row.code for row in Jsonl(path=sys.argv[1]).rows(LocalPlaces(), lambda _: None)]
status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory before exec
print(codes, int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("content", "codes"),
    [
        (gzip.compress(b"x" * (256 << 20), 6), "['E_GZIP_BOMB']"),
        (b'{"prompt": "' + b"x" * (64 << 20), "['E_OVERSIZE_ROW']"),
        (b'{"prompt": ' + b"[" * (4 << 20) + b"\n", "['E_TOO_DEEP']"),
    ],
    ids=["bomb", "endless_row", "brackets"],
)
def test_memory_stays_bounded(content: bytes, codes: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM, str(path)], capture_output=True, text=True, check=True)
    found, peak_mib = done.stdout.rsplit(maxsplit=1)
    assert found == codes
    assert int(peak_mib) <= 256
