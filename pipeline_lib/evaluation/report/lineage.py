"""The artifacts that led to a verdict, found by walking the manifests' inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline_lib.schema import ArtifactRef

if TYPE_CHECKING:
    from pipeline_lib.storage.store import ArtifactStore, Manifest


@dataclass(frozen=True)
class Node:
    """One artifact of the lineage."""

    ref: ArtifactRef
    manifest: Manifest
    depth: int
    """Length of the longest chain of inputs under it; 0 for an artifact without inputs."""
    names: tuple[str, ...]
    """Names of the models of the run that it is, e.g. `dpo`; mostly none."""
    is_inherited: bool
    """True where only the champion of an earlier run leads to it."""

    @property
    def stage(self) -> str:
        """Name of the stage that made it."""
        return self.manifest.stage

    @property
    def title(self) -> str:
        """Stage and, for an evaluation, the model it is about."""
        if self.manifest.kind == "evaluation" and self.names:
            return f"eval · {', '.join(self.names)}"
        return self.stage

    def has(self, path: str) -> bool:
        """Return whether the artifact holds a file."""
        return path in self.manifest.files


@dataclass(frozen=True)
class Lineage:
    """Every artifact under a verdict, inputs before what was made from them."""

    nodes: tuple[Node, ...]

    def __getitem__(self, ref: ArtifactRef) -> Node:
        """Return the node of an artifact.

        Raises:
            KeyError: The artifact is not in the lineage.
        """
        for node in self.nodes:
            if node.ref == ref:
                return node
        raise KeyError(str(ref))

    @property
    def own(self) -> tuple[Node, ...]:
        """The nodes of this run, without those that only an earlier champion leads to."""
        return tuple(node for node in self.nodes if not node.is_inherited)


def walk(store: ArtifactStore, verdict: ArtifactRef, dataset: ArtifactRef, *further: ArtifactRef) -> Lineage:
    """Collect the verdict, its dataset and everything they were made from.

    Args:
        store: Where manifests are read.
        verdict: The artifact of kind `verdict`.
        dataset: The dataset that the run's stages used.
        further: Artifacts of the run that need not have led to the verdict.

    Returns:
        The lineage in an order that depends on the manifests alone: by depth, stage and id.
    """
    manifests: dict[ArtifactRef, Manifest] = {}
    own = _reach(store, [verdict, dataset, *further], manifests, skip=("evaluation:champion",))
    everything = _reach(store, [verdict, dataset, *further], manifests)
    names = _model_names(manifests, verdict)
    depths: dict[ArtifactRef, int] = {}
    nodes = [
        Node(ref, manifests[ref], _depth(ref, manifests, depths), tuple(names.get(ref, ())), ref not in own)
        for ref in everything
    ]
    return Lineage(tuple(sorted(nodes, key=lambda node: (node.depth, node.stage, node.names, node.ref.id))))


def _reach(
    store: ArtifactStore,
    roots: list[ArtifactRef],
    manifests: dict[ArtifactRef, Manifest],
    *,
    skip: tuple[str, ...] = (),
) -> set[ArtifactRef]:
    """Return all artifacts that inputs lead to, but not through inputs of the names to skip."""
    found: set[ArtifactRef] = set()
    todo = list(roots)
    while todo:
        ref = todo.pop()
        if ref in found:
            continue
        found.add(ref)
        if ref not in manifests:
            manifests[ref] = store.manifest(ref)
        todo += [leads for name, leads in manifests[ref].inputs.items() if name not in skip]
    return found


def _depth(ref: ArtifactRef, manifests: Mapping[ArtifactRef, Manifest], depths: dict[ArtifactRef, int]) -> int:
    if ref not in depths:
        below = [_depth(leads, manifests, depths) for leads in manifests[ref].inputs.values()]
        depths[ref] = 1 + max(below, default=-1)
    return depths[ref]


def _model_names(manifests: Mapping[ArtifactRef, Manifest], verdict: ArtifactRef) -> dict[ArtifactRef, list[str]]:
    """Return the run's names of evaluations and of the models they are about."""
    names: dict[ArtifactRef, list[str]] = {}
    for key, evaluation in sorted(manifests[verdict].inputs.items()):
        prefix, _, name = key.partition(":")
        if prefix != "evaluation":
            continue
        names.setdefault(evaluation, []).append(name)
        model = manifests[evaluation].inputs.get("model")
        if model is not None:
            names.setdefault(model, []).append(name)
    return names
