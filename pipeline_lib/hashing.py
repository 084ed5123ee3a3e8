"""Canonical JSON and sha256: the only two ways this code base names content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """Encode a JSON value so that equal values give equal bytes.

    Keys are sorted, there is no white space, text is UTF-8 and not escaped.

    Raises:
        ValueError: The value holds NaN or infinity, which JSON has no word for.
        TypeError: The value is no JSON value.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def sha256_bytes(content: bytes) -> str:
    """Return the sha256 of bytes as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def sha256_json(value: Any) -> str:
    """Return the sha256 of a JSON value in canonical form as 64 hex digits."""
    return sha256_bytes(canonical_json(value))


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's content, read in chunks, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def derive_seed(seed: int, *scope: str | int) -> int:
    """Derive an independent 63-bit seed for a scope, e.g. `derive_seed(0, "sft", "step", 12)`.

    A random number is a function of (seed, scope) and of nothing that happened before, so a
    resumed run draws what an uninterrupted one draws.
    """
    return int(sha256_json([seed, *scope])[:16], 16) >> 1
