"""The gate metrics: one a file, and this table. To add one, see docs/adding/gate-rule.md."""

from pipeline_lib.registry import Table

_HERE = "pipeline_lib.evaluation.gate_metrics"

GATE_METRICS = Table(
    "gate metric",
    {
        "bleu": f"{_HERE}.bleu:Bleu",
        "distinct_n": f"{_HERE}.distinct_n:DistinctN",
        "finished": f"{_HERE}.finished:Finished",
        "kl": f"{_HERE}.kl:Kl",
        "length": f"{_HERE}.length:Length",
        "perplexity": f"{_HERE}.perplexity:Perplexity",
        "reward_model_accuracy": f"{_HERE}.reward_model_accuracy:RewardModelAccuracy",
        "rouge_l": f"{_HERE}.rouge_l:RougeL",
        "score": f"{_HERE}.score:Score",
        "win_rate": f"{_HERE}.win_rate:WinRate",
    },
)
