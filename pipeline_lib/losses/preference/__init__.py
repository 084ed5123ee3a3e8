"""The preference losses: one formula a file, and this table. To add one, see docs/adding/loss.md."""

from pipeline_lib.registry import Table

PREFERENCE_LOSSES = Table("preference loss", {"dpo": "pipeline_lib.losses.preference.dpo:Dpo"})
