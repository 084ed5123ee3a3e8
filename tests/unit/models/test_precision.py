"""The number format of a machine: what it has instructions for, and a word where it is asked for what it has not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline_lib.models import precision
from pipeline_lib.models.precision import resolve_dtype, slow_precision
from pipeline_lib.models.settings import Precision

OLD = "flags : fpu sse avx2 fma"
NEW = "flags : fpu sse avx2 fma avx512f avx512_bf16"


@pytest.mark.parametrize(
    ("flags", "has_gpu", "asked_for", "taken", "is_slow"),
    [
        (OLD, False, "auto", torch.float32, False),
        (OLD, False, "fp32", torch.float32, False),
        (OLD, False, "bf16", torch.bfloat16, True),
        (OLD, True, "auto", torch.bfloat16, False),
        (OLD, True, "fp32", torch.float32, False),
        (OLD, True, "bf16", torch.bfloat16, False),
        (NEW, False, "auto", torch.bfloat16, False),
        (NEW, False, "fp32", torch.float32, False),
        (NEW, False, "bf16", torch.bfloat16, False),
        (None, False, "auto", torch.float32, False),  # no such file: not Linux
        (None, False, "bf16", torch.bfloat16, True),
    ],
)
def test_formats(
    flags: str | None, has_gpu: bool, asked_for: Precision, taken: torch.dtype, is_slow: bool,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(flags)
    monkeypatch.setattr(precision, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert resolve_dtype(asked_for) == taken
    warning = slow_precision(asked_for)
    assert (warning is not None) == is_slow
    assert warning is None or "`auto` takes fp32 here" in warning
