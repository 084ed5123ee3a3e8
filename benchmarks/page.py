"""The generated parts of docs/performance.md, each between markers of its own."""

from __future__ import annotations

from pathlib import Path


def marker(part: str, place: str) -> str:
    """Return a marker: `<!-- PART:begin -->` or `<!-- PART:end -->`."""
    return f"<!-- {part}:{place} -->"


def write_between(page: Path, part: str, generated: str, *, heading: str | None = None) -> None:
    """Write a generated part between a page's markers.

    Args:
        page: The page.
        part: The part's name in its markers.
        generated: What stands between them from now on.
        heading: Where the page lacks the markers, they are appended to it under this text; None refuses such a page.

    Raises:
        ValueError: The page lacks the markers.
    """
    begin, end = marker(part, "begin"), marker(part, "end")
    text = page.read_text(encoding="utf-8") if page.exists() else "# Performance\n"
    if heading is not None and begin not in text:
        text = f"{text.rstrip()}\n\n{heading}\n\n{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise ValueError(f"{page} lacks the markers {begin} and {end}")
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}\n{generated}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
