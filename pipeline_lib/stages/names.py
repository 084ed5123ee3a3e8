"""Names that a configuration gives to its candidates and reward models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]{0,30}$")]
"""Name of a candidate or a reward model."""
