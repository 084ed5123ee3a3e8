"""Promotion: the champion pointer by compare-and-swap, then its mirror in the model registry.

The pointer in the artifact store is the truth. Registration is idempotent by artifact id; a
promotion that was killed half-way is finished by the next run, and nothing is promoted twice.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline_lib.errors import ConflictError
from pipeline_lib.hashing import sha256_json
from pipeline_lib.schema import ArtifactRef, CandidateVerdict, Verdict
from pipeline_lib.stages.faults import kill_point
from pipeline_lib.storage.lease import Lease
from pipeline_lib.storage.pointer import Pointer
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.tracking import ModelRegistry
from pipeline_lib.validation import Frozen

_NAME = "^[a-z0-9][a-z0-9._-]{0,62}$"


class PromoteConfig(Frozen):
    """Where a passing candidate goes."""

    enabled: bool = True
    """false: candidates are judged only; nothing is registered and no champion changes."""
    model_name: str = Field("prefline-demo", pattern=_NAME)
    """Name of the registered model."""
    alias: str = Field("champion", pattern=_NAME)
    """Alias that names the promoted version."""


class Champion(Frozen):
    """The champion pointer's value."""

    model: ArtifactRef
    verdict: ArtifactRef
    """The evidence it was promoted on."""
    previous: ArtifactRef | None = None
    """The model it replaced."""
    revoked: tuple[str, ...] = ()
    """Ids of models that were rolled back and are not promoted again by themselves."""


class Promotion(Frozen):
    """What a promotion did."""

    status: Literal["promoted", "already_champion", "rejected", "revoked", "not_asked"]
    model_name: str
    alias: str
    version: str | None
    """The winner's version, or None where no candidate passed."""
    model: ArtifactRef | None
    reason: str
    versions: dict[str, str]
    """The version of every candidate, by its name in the run."""


def champion_pointer(store: ArtifactStore, model_name: str) -> Pointer:
    """Return the pointer that says which model is champion."""
    return Pointer(store, f"champion-{model_name}")


def read_champion(store: ArtifactStore, model_name: str) -> Champion | None:
    """Return the present champion."""
    found = champion_pointer(store, model_name).read()
    return None if found is None else Champion.model_validate(found[0])


def incumbent(store: ArtifactStore, model_name: str, candidates: list[ArtifactRef]) -> ArtifactRef | None:
    """Return the model that a run's candidates compete with.

    That is the champion; but where the champion is one of these candidates, promoted by an earlier
    run of the same configuration, it is the model that this candidate replaced. So a repeated run
    asks the gate the same question and finds its verdict.
    """
    champion = read_champion(store, model_name)
    if champion is None:
        return None
    return champion.previous if champion.model in candidates else champion.model


def promote(
    config: PromoteConfig,
    verdict_ref: ArtifactRef,
    *,
    store: ArtifactStore,
    registry: ModelRegistry,
    cache: Path,
    run_id: str | None,
    tags: dict[str, str],
) -> Promotion:
    """Register all candidates and move champion pointer and alias to the winner, if there is one.

    Args:
        config: Names.
        verdict_ref: The gate's verdict.
        store: The artifact store.
        registry: The model registry.
        cache: Folder into which a winner's files are fetched.
        run_id: The MLflow run that the winner's model is logged to.
        tags: Tags of every version, e.g. the run and its configuration's sha256.

    Raises:
        ConflictError: Another run moved the champion since the evidence was weighed.
        TrackingError: The registry does not answer.
    """
    verdict = Verdict.model_validate(store.read_json(verdict_ref, "verdict.json"))
    if not config.enabled:
        return _nobody(config, "not_asked", f"promotion is off; the gate's choice is {verdict.winner or 'none'}", {})
    versions = {}
    for candidate in verdict.candidates:
        is_winner = candidate.name == verdict.winner
        all_tags = tags | _gate_tags(candidate, verdict_ref, is_winner=is_winner)
        versions[candidate.name] = _register(
            config, candidate, store=store, registry=registry, run_id=run_id, tags=all_tags,
            directory=cache / candidate.model.id[:12] if is_winner else None,
        )  # fmt: skip
    if verdict.winner is None:
        failures = "; ".join(f"{c.name}: {_first_failure(c)}" for c in verdict.candidates)
        return _nobody(config, "rejected", f"no candidate passed the gate: {failures}", versions)
    winner = verdict.candidate(verdict.winner)
    kill_point("promote", "after_register")
    status = _move_pointer(config, winner, verdict, verdict_ref, store)
    kill_point("promote", "after_pointer")
    version = versions[winner.name]
    if status != "revoked":
        mirror_champion(config, store=store, registry=registry)
    reasons = {
        "promoted": f"{winner.name} passed every rule and is the best by the gate's order",
        "already_champion": f"{winner.name} is the champion already",
        "revoked": f"{winner.name} was rolled back before, so it is not promoted again",
    }
    return Promotion(
        status=status, model_name=config.model_name, alias=config.alias, version=version, model=winner.model,
        reason=reasons[status], versions=versions,
    )  # fmt: skip


def _nobody(
    config: PromoteConfig, status: Literal["rejected", "not_asked"], reason: str, versions: dict[str, str]
) -> Promotion:
    return Promotion(
        status=status, model_name=config.model_name, alias=config.alias, version=None, model=None, reason=reason,
        versions=versions,
    )  # fmt: skip


def mirror_champion(config: PromoteConfig, *, store: ArtifactStore, registry: ModelRegistry) -> str | None:
    """Let the registry's alias follow the champion pointer; return the version."""
    champion = read_champion(store, config.model_name)
    if champion is None:
        return None
    version = registry.find(config.model_name, champion.model.id, loadable=True)
    current = registry.version_of_alias(config.model_name, config.alias)
    if version is not None and (current is None or current[0] != version):
        registry.set_alias(config.model_name, config.alias, version)
    return version


def roll_back(config: PromoteConfig, *, store: ArtifactStore, registry: ModelRegistry) -> Champion:
    """Make the model that the champion replaced champion again, and bar the present one.

    Raises:
        ConflictError: There is no champion, it replaced none, or another process moved it.
    """
    pointer = champion_pointer(store, config.model_name)
    found = pointer.read()
    champion = None if found is None else Champion.model_validate(found[0])
    if found is None or champion is None or champion.previous is None:
        raise ConflictError(
            f"{config.model_name} has no earlier champion to go back to",
            next_step="`prefline explain` shows the present champion; promote another model by a run",
        )
    restored = Champion(
        model=champion.previous, verdict=champion.verdict, revoked=(*champion.revoked, champion.model.id)
    )
    pointer.swap(found[1], restored.model_dump(mode="json"))
    mirror_champion(config, store=store, registry=registry)
    return restored


def _register(
    config: PromoteConfig,
    candidate: CandidateVerdict,
    *,
    store: ArtifactStore,
    registry: ModelRegistry,
    run_id: str | None,
    tags: dict[str, str],
    directory: Path | None,
) -> str:
    """Register a candidate once, however often and from however many processes this is called."""
    key = sha256_json(["register", config.model_name, candidate.model.id])
    with Lease.acquire(store, key, owner=f"register {candidate.name}"):
        found = registry.find(config.model_name, candidate.model.id, loadable=directory is not None)
        if found is not None:
            return found
        if directory is None:
            uri = store.uri(candidate.model)
            return registry.register_reference(config.model_name, candidate.model.id, uri=uri, run_id=run_id, tags=tags)
        from pipeline_lib.models.publish import log_and_verify  # noqa: PLC0415  (torch)

        store.fetch(candidate.model, directory)
        return registry.register_loadable(
            config.model_name, candidate.model.id, partial(log_and_verify, directory / "model"),
            run_id=run_id, tags=tags,
        )  # fmt: skip


def _move_pointer(
    config: PromoteConfig,
    winner: CandidateVerdict,
    verdict: Verdict,
    verdict_ref: ArtifactRef,
    store: ArtifactStore,
) -> Literal["promoted", "already_champion", "revoked"]:
    pointer = champion_pointer(store, config.model_name)
    found = pointer.read()
    champion = None if found is None else Champion.model_validate(found[0])
    if champion is not None and champion.model == winner.model:
        return "already_champion"
    if champion is not None and winner.model.id in champion.revoked:
        return "revoked"
    if (champion.model if champion else None) != verdict.champion:
        raise ConflictError(
            f"the champion of {config.model_name} is now {champion.model if champion else None}, "
            f"the evidence was weighed against {verdict.champion}",
            next_step="run the same command again: it weighs the candidates against the new champion",
        )
    value = Champion(
        model=winner.model, verdict=verdict_ref, previous=verdict.champion,
        revoked=champion.revoked if champion else (),
    )  # fmt: skip
    pointer.swap(found[1] if found else None, value.model_dump(mode="json"))
    return "promoted"


def _gate_tags(candidate: CandidateVerdict, verdict: ArtifactRef, *, is_winner: bool) -> dict[str, str]:
    outcome = "promoted" if is_winner else ("passed" if candidate.is_passed else "rejected")
    return {
        "prefline.candidate": candidate.name,
        "prefline.gate": outcome,
        "prefline.gate_reason": _first_failure(candidate) if not candidate.is_passed else "every rule passed",
        "prefline.verdict_id": verdict.id,
    }


def _first_failure(candidate: CandidateVerdict) -> str:
    failed = [rule for rule in candidate.rules if rule.status == "fail"]
    return f"{failed[0].rule}: {failed[0].reason}"[:400] if failed else "passed"
