"""Who labelled the rounds of candidates instead of the reward model, and how far the labels agree with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_lib.evaluation.report.lineage import Lineage, Node
from pipeline_lib.schema import ArtifactRef

if TYPE_CHECKING:
    from pipeline_lib.storage.store import ArtifactStore

_STAGE, _FILE = "labels", "agreement.json"


@dataclass(frozen=True)
class LabelledRound:
    """The labels of one round."""

    names: tuple[str, ...]
    """The run's models that were trained on them, mostly one."""
    ref: ArtifactRef
    by: str
    """A judge, or people."""
    figures: dict[str, Any]
    """What `agreement.json` says."""

    def part(self, name: str) -> dict[str, Any]:
        """Return the agreement with somebody, empty where nobody was asked."""
        found: dict[str, Any] = self.figures.get(name, {})
        return found


def labelled_rounds(store: ArtifactStore, lineage: Lineage) -> tuple[LabelledRound, ...]:
    """Read the labels of every round, earlier rounds first."""
    nodes = [node for node in lineage.own if node.stage == _STAGE and node.has(_FILE)]
    above = {node.ref: _trained_on(lineage, node) for node in nodes}
    nodes.sort(key=lambda node: (above[node.ref], node.depth))
    figures = {node.ref: store.read_json(node.ref, _FILE) for node in nodes}
    return tuple(
        LabelledRound(above[node.ref], node.ref, figures[node.ref]["labels"], figures[node.ref]) for node in nodes
    )


def _trained_on(lineage: Lineage, labels: Node) -> tuple[str, ...]:
    """Return the names of the models that labels led to."""
    reached = {labels.ref}
    for node in lineage.nodes:  # inputs stand before what was made from them
        if reached & set(node.manifest.inputs.values()):
            reached.add(node.ref)
    named = (node for node in lineage.nodes if node.ref in reached and node.manifest.kind == "model")
    return tuple(sorted({name for node in named for name in node.names}))
