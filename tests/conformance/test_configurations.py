"""Plug-ins are configured on machines that have no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "configure",
    [
        "from pipeline_lib.losses.preference import PREFERENCE_LOSSES as t; [t.build({'name': n}) for n in t]",
        "from pipeline_lib.losses.reward import REWARD_LOSSES as t; [t.build({'name': n}) for n in t]",
        "from pipeline_lib.training.rewards import REWARD_SOURCES as t; [t[n] for n in t]",
        "from pipeline_lib.training.reward_set import RewardSet; RewardSet()",
        "from pipeline_lib.generation import GENERATORS as t; [t[n] for n in t]",
    ],
    ids=["preference-losses", "reward-losses", "reward-sources", "reward-set", "generators"],
)
def test_configurations_need_no_torch(configure: str) -> None:
    program = f"import sys; {configure}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
