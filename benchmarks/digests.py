"""One fingerprint for each update: of its sequences' token ids and counted labels.

Both sides make it from what reaches the model. Imports neither library: both environments use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

_MODULUS = 1 << 64


def sequence_digest(ids: Sequence[int], labels: Sequence[int]) -> int:
    """Return a number for one sequence: its ids without padding, and the labels that count in the loss."""
    text = f"{','.join(map(str, ids))}|{','.join(map(str, labels))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def step_digest(sequences: Iterable[int]) -> str:
    """Return the fingerprint of an update: the sum over its sequences, whatever their order."""
    return f"{sum(sequences) % _MODULUS:016x}"
