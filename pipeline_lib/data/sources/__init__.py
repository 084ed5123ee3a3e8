"""The table of sources. A new one is a file here and a line in the table."""

from __future__ import annotations

from pipeline_lib.registry import Table

SOURCES = Table(
    "source",
    {
        "hugging_face": "pipeline_lib.data.sources.hugging_face:HuggingFace",
        "jsonl": "pipeline_lib.data.sources.jsonl:Jsonl",
        "parquet": "pipeline_lib.data.sources.parquet:Parquet",
        "pydoc": "pipeline_lib.data.sources.pydoc:Pydoc",
    },
)
