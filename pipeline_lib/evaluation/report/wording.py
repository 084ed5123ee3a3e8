"""How figures are written for people: numbers, intervals, times and sizes. `–` stands for no figure."""

from __future__ import annotations

import math

from pipeline_lib.schema import Interval

NONE = "–"

_MINUTE_S = 60
_HOUR_S = 3600
_MIB = 1024**2
_GIB = 1024**3
_SMALLEST_PLAIN = 0.01
_SMALLEST_DECIMAL = 0.0001


def number(value: object) -> str:
    """Return a number as people compare it: 1,234 · 12.3 · 1.23 · 0.123 · 0.0012 · 1.2e−5.

    None and numbers that are not finite give `–`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    size_of = abs(value)
    if size_of == 0:
        return "0"
    if size_of < _SMALLEST_PLAIN:
        return given(float(f"{value:.2g}"))
    decimals = next((places for bound, places in ((100, 0), (10, 1), (1, 2)) if size_of >= bound), 3)
    return _signed(f"{value:,.{decimals}f}")


def given(value: object) -> str:
    """Return a number as someone would write it, e.g. a threshold: 0.5 · 12 · 1e−5; `–` for none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    if 0 < abs(value) < _SMALLEST_DECIMAL:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return _signed(f"{float(mantissa):g}e{int(exponent)}")
    return _signed(f"{value:,.10f}".rstrip("0").rstrip("."))


def count(value: object) -> str:
    """Return a whole number with thousands separators, or `–`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    return _signed(f"{round(value):,}")


def percent(value: object) -> str:
    """Return a share in 0 to 1 as a percentage, or `–`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    return f"{given(round(100 * value, 1))}\u00a0%"


def bounds(interval: Interval) -> str:
    """Return `low … high` of an interval, or `–` where it could not be estimated."""
    if interval.low is None or interval.high is None:
        return NONE
    return f"{number(interval.low)} … {number(interval.high)}"


def duration(seconds: object) -> str:
    """Return a time as `8.2 s`, `3 min 05 s` or `1 h 12 min`, or `–`."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NONE
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S:02d} s"
    return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S:02d} min"


def size(num_bytes: object) -> str:
    """Return a size in MiB or GiB, or `–`."""
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int | float) or not math.isfinite(num_bytes):
        return NONE
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.0f} MiB"


def plain(name: str) -> str:
    """Return a figure's name in words: `ref_kl_nats` becomes `ref kl (nats)`."""
    words = name.replace("/", " ").split("_")
    if len(words) > 1 and words[-1] in ("nats", "tokens", "bytes", "s"):
        return f"{' '.join(words[:-1])} ({words[-1]})"
    if len(words) > 1 and words[-1] == "frac":
        return " ".join(words[:-1])
    return " ".join(words)


def _signed(text: str) -> str:
    return text.replace("-", "−")
