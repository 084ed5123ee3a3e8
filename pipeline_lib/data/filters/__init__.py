"""The table of filter rules. A new one is a file here and a line in the table."""

from __future__ import annotations

from pipeline_lib.registry import Table

FILTERS = Table(
    "filter",
    {
        "control_tokens": "pipeline_lib.data.filters.control_tokens:ControlTokens",
        "empty": "pipeline_lib.data.filters.empty:Empty",
        "identical_pair": "pipeline_lib.data.filters.identical_pair:IdenticalPair",
        "length": "pipeline_lib.data.filters.length:Length",
        "length_ratio": "pipeline_lib.data.filters.length_ratio:LengthRatio",
        "repetition": "pipeline_lib.data.filters.repetition:Repetition",
        "roles": "pipeline_lib.data.filters.roles:Roles",
        "unicode": "pipeline_lib.data.filters.unicode:Unicode",
    },
)
