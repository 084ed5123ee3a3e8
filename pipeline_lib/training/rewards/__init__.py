"""The reward sources: one a file, and this table. To add one, see docs/adding/reward.md."""

from pipeline_lib.registry import Table

_HERE = "pipeline_lib.training.rewards"

REWARD_SOURCES = Table(
    "reward source",
    {
        # Models.
        "reward_model": f"{_HERE}.reward_model:RewardModel",
        "llama2": f"{_HERE}.llama2:Llama2",
        "judge": f"{_HERE}.judge:Judge",
        # Rules on the text.
        "length": f"{_HERE}.length:Length",
        "words": f"{_HERE}.words:Words",
        "regex": f"{_HERE}.regex:Regex",
        "ends_with": f"{_HERE}.ends_with:EndsWith",
        "format": f"{_HERE}.format:Format",
        "exact_answer": f"{_HERE}.exact_answer:ExactAnswer",
        # Somebody else's program.
        "function": f"{_HERE}.function:Function",
        "http": f"{_HERE}.http:Http",
    },
)
