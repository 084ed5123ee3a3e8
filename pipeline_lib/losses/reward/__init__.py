"""The losses of reward models: one formula a file, and this table."""

from pipeline_lib.registry import Table

_HERE = "pipeline_lib.losses.reward"

REWARD_LOSSES = Table(
    "reward loss",
    {
        "bradley_terry": f"{_HERE}.bradley_terry:BradleyTerry",
        "kwise": f"{_HERE}.kwise:KWise",
        "plackett_luce": f"{_HERE}.plackett_luce:PlackettLuce",
        "best_of_k": f"{_HERE}.best_of_k:BestOfK",
    },
)
