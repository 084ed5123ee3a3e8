"""A stage's progress artifact in Prefect: the share done, what is going on, and the newest figures.

It is a view: whatever goes wrong with it is logged and stops nothing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

logger = logging.getLogger(__name__)

EVERY_S = 3.0
"""Seconds between two updates, at least."""
_SHOWN = {
    "score": "score {:.3g}",
    "heldout_score": "held-out score {:.3g}",
    "ref_kl_nats": "KL {:.3g} nats a response",
    "accuracy_frac": "accuracy {:.3g}",
    "loss": "loss {:.4g}",
    "rollout_tokens_per_s": "{:.0f} tokens/s sampled",
    "update_tokens_per_s": "{:.0f} tokens/s trained",
}
"""Figures of the description, by the last part of their names, in this order."""


class LiveArtifact:
    """One stage run's artifact."""

    def __init__(self, name: str, *, is_eager: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Make nothing yet.

        Args:
            name: Name of the task run, e.g. `ppo`; the artifact's key is made of it.
            is_eager: Make the artifact with the first progress, and not only once the stage has lasted a while.
            clock: Seconds from any start.
        """
        self.key = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + "-progress"
        self._name, self._clock = name, clock
        self._id: UUID | None = None
        self._figures: dict[str, float] = {}
        self._fraction = 0.0
        self._due_s = clock() if is_eager else clock() + EVERY_S

    def note(self, values: Mapping[str, float]) -> None:
        """Remember the newest figures; they are shown with the next progress."""
        for name, value in values.items():
            short = name.rpartition("/")[2]
            # `reward/score` would be a part of the score: only a figure of the stage itself counts.
            if short in _SHOWN and name.count("/") <= 1:
                self._figures[short] = value

    def move(self, fraction: float, text: str) -> None:
        """Show the share done, where the last time was long enough ago."""
        self._fraction = min(1.0, fraction)
        now = self._clock()
        if now >= self._due_s:
            self._due_s = now + EVERY_S
            self._publish(text)

    def say(self, text: str) -> None:
        """Show what is going on, where no share of it is known."""
        self.move(self._fraction, text)

    def finish(self, text: str, *, is_done: bool) -> None:
        """Show how the stage ended; what was never shown stays so."""
        if is_done:
            self._fraction = 1.0
        if self._id is not None:
            self._publish(text)

    def _publish(self, text: str) -> None:
        shown = [name for name in _SHOWN if name in self._figures and name not in text]
        figures = [_SHOWN[name].format(self._figures[name]) for name in shown]
        description = " · ".join([f"**{self._name}** {text}", *figures])
        try:
            if self._id is None:
                made = create_progress_artifact(100 * self._fraction, key=self.key, description=description)
                assert isinstance(made, UUID)
                self._id = made
            else:
                update_progress_artifact(self._id, 100 * self._fraction, description=description)
        except Exception as error:
            logger.debug("progress artifact: %s", error)
