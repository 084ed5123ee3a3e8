"""Check the store: every artifact's id and files, every name that points at one, every checkpoint.

What is only left over (files that no artifact names, uploads that never ended) is no error: `gc`
takes it once it is old enough that no running commit can still want it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from pipeline_lib.errors import IntegrityError, StorageError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.checkpoints import CheckpointManifest
from pipeline_lib.storage.store import ArtifactStore, FileEntry, Manifest, blob_path
from pipeline_lib.validation import Frozen

MIN_AGE_S = 24 * 3600.0
"""Age from which left-over files are taken; a commit trusts files of at most half of it."""

Severity = Literal["error", "warning", "repaired", "reclaimable"]


class Finding(Frozen):
    """One thing that is not as it should be."""

    severity: Severity
    subject: str
    """What it is about: an artifact, a stage key, a pointer, a checkpoint."""
    problem: str
    next_step: str

    def __str__(self) -> str:
        """Return the finding in two lines."""
        return f"{self.severity}: {self.subject}: {self.problem}\n  next: {self.next_step}"


class FsckReport(Frozen):
    """What was looked at and what was found."""

    findings: tuple[Finding, ...]
    num_artifacts: int
    num_blobs: int
    num_bytes: int
    """Of all blobs."""
    num_names: int
    """Stage results and pointers."""
    num_checkpoints: int
    is_deep: bool
    """True where every file was read and hashed, not only looked up."""

    @property
    def num_errors(self) -> int:
        """Findings that need something done."""
        return sum(finding.severity == "error" for finding in self.findings)

    def in_words(self) -> str:
        """Return the report for people: findings, then one line of counts."""
        how = "read and hashed" if self.is_deep else "looked up"
        counts = Counter(finding.severity for finding in self.findings)
        found = ", ".join(f"{counts[each]} {each}" for each in ("error", "warning", "repaired", "reclaimable"))
        summary = (
            f"{self.num_artifacts} artifacts, {self.num_blobs} files ({self.num_bytes:,} bytes, {how}), "
            f"{self.num_names} names, {self.num_checkpoints} checkpoints: {found}"
        )
        return "\n".join([*(str(finding) for finding in self.findings), summary])


class Reclaimed(Frozen):
    """What `gc` took, or would take."""

    num_blobs: int
    num_bytes: int
    num_uploads: int
    num_checkpoint_files: int
    is_dry_run: bool


@dataclass
class _Check:
    """The state of one check: what is there, and what was found so far."""

    store: ArtifactStore
    deep: bool
    repair: bool
    findings: list[Finding] = field(default_factory=list)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Readable ones, by artifact id."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of every blob, by path."""
    damage: dict[str, str] = field(default_factory=dict)
    """What is wrong with a blob, by path."""
    wanted: set[str] = field(default_factory=set)
    """Ids of the artifacts that a stage key or a pointer names."""
    num_names: int = 0
    num_checkpoints: int = 0

    def add(self, severity: Severity, subject: str, problem: str, next_step: str) -> None:
        self.findings.append(Finding(severity=severity, subject=subject, problem=problem, next_step=next_step))

    def read_manifests(self) -> None:
        """Read every manifest, before the blobs are listed: what it names was there first."""
        for listed in self.store.objects.list("artifacts/"):
            artifact_id = listed.path.split("/")[1]
            found = self.store.objects.get(listed.path)
            if found is None:
                continue
            try:
                manifest = Manifest.model_validate_json(found.content)
            except ValidationError:
                manifest = None
            if manifest is None or manifest.id != artifact_id:
                self.add(
                    "error", f"artifact {artifact_id[:12]}", "its manifest is not what its id names",
                    "run `prefline fsck --repair`, then the pipeline: its stage makes it anew",
                )  # fmt: skip
                continue
            self.manifests[artifact_id] = manifest

    def check_blobs(self) -> None:
        """Compare every blob that a manifest names, and in a deep check every other too, with its name."""
        self.sizes = {listed.path: listed.size_bytes for listed in self.store.objects.list("blobs/")}
        entries = {
            blob_path(entry.sha256): entry for manifest in self.manifests.values() for entry in manifest.files.values()
        }
        for path in sorted({*entries, *(self.sizes if self.deep else ())}):
            sha256 = path.rsplit("/", 1)[1]
            damage = self._damage(path, sha256, size_bytes=entries[path].size_bytes if path in entries else None)
            if damage is not None:
                self.damage[path] = damage
                if self.repair:
                    self._restore(path, sha256)

    def _damage(self, path: str, sha256: str, *, size_bytes: int | None) -> str | None:
        size = self.sizes.get(path)
        if size is None:
            return "is missing"
        if size_bytes is not None and size != size_bytes:
            return f"has {size:,} bytes instead of {size_bytes:,}"
        return self._content_problem(path, sha256) if self.deep else None

    def _content_problem(self, path: str, sha256: str) -> str | None:
        try:
            found = self.store.objects.sha256_of(path)
        except (IntegrityError, StorageError) as error:
            self.store.objects.head(path)  # raises where it is the server that is gone, not the file
            return f"cannot be read ({error.cause})"
        return None if found == sha256 else "has other content than its sha256 says"

    def _restore(self, path: str, sha256: str) -> None:
        """Put a damaged blob right from the local cache; where that has none, take it away."""
        cached = self.store.cached_file(sha256)
        if cached is None:
            self.store.objects.delete(path)  # so that the next commit of this content writes it anew
            return
        self.store.objects.upload(cached, path, sha256=sha256)
        self.add("repaired", f"file {sha256[:12]}", f"{self.damage.pop(path)}; restored from the local cache", "none")

    def check_stages(self) -> None:
        """Check every stage's result; a repair forgets those that are damaged, so the stage runs again."""
        for listed in list(self.store.objects.list("stages/")):
            self.num_names += 1
            key = listed.path.rsplit("/", 1)[1].removesuffix(".json")
            try:
                ref = self.store.result_of(key)
            except IntegrityError:
                ref = None
            problem = "is not readable" if ref is None else self.problem_of(ref.id)
            if self.repair and problem is not None:
                self.store.objects.delete(listed.path)
                self.add("repaired", f"stage {key[:12]}", f"its result {ref} {problem}; it is forgotten",
                         "run the pipeline again: the stage runs again")  # fmt: skip
                continue
            if ref is not None:
                self.wanted.add(ref.id)
            if problem is not None:
                self.add("error", f"stage {key[:12]}", f"its result {ref} {problem}",
                         "run `prefline fsck --repair`, then the pipeline: the stage runs again")  # fmt: skip

    def check_pointers(self) -> None:
        """Check that every artifact that a pointer names is there and whole."""
        for listed in self.store.objects.list("pointers/"):
            self.num_names += 1
            name = listed.path.removeprefix("pointers/").removesuffix(".json")
            found = self.store.objects.get(listed.path)
            try:
                value = json.loads(found.content) if found is not None else None
            except ValueError:
                self.add("error", f"pointer {name}", "is no JSON", "promote again, or roll back")
                continue
            for ref in _refs_in(value):
                self.wanted.add(ref.id)
                problem = self.problem_of(ref.id)
                if problem is not None:
                    self.add("error", f"pointer {name}", f"names {ref}, which {problem}",
                             "run the pipeline again, or `prefline rollback`")  # fmt: skip

    def check_checkpoints(self) -> None:
        """Check every checkpoint; a damaged one is a warning, as the one before it is taken instead.

        A repair takes its manifest away, so that no resume reads it through again.
        """
        listed = {each.path: each.size_bytes for each in self.store.objects.list("checkpoints/")}
        for path in sorted(each for each in listed if each.endswith(".json")):
            self.num_checkpoints += 1
            found = self.store.objects.get(path)
            try:
                files = CheckpointManifest.model_validate_json(found.content).files if found is not None else {}
                folder = path.removesuffix(".json")
                problems = [
                    f"{name} {problem}" for name, entry in files.items()
                    if (problem := self._checkpoint_damage(f"{folder}/{entry.sha256}", entry, listed)) is not None
                ]  # fmt: skip
            except ValidationError:
                problems = ["its manifest is not readable"]
            for problem in problems:
                if self.repair:
                    self.store.objects.delete(path)
                    self.add("repaired", path, f"{problem}; it is forgotten", "none: the one before it is taken")
                else:
                    self.add("warning", path, problem, "none: the one before it is taken")

    def _checkpoint_damage(self, path: str, entry: FileEntry, listed: dict[str, int]) -> str | None:
        if listed.get(path) != entry.size_bytes:
            return "is missing" if path not in listed else "has another size"
        return self._content_problem(path, entry.sha256) if self.deep else None

    def check_artifacts(self) -> None:
        """Name what is damaged, artifact by artifact; of one that nothing names, it is no error."""
        for artifact_id, manifest in self.manifests.items():
            severity: Severity = "error" if artifact_id in self.wanted else "warning"
            step = "run `prefline fsck --repair`, then the pipeline" if severity == "error" else "run the pipeline"
            for name, entry in manifest.files.items():
                damage = self.damage.get(blob_path(entry.sha256))
                if damage is not None:
                    self.add(severity, f"artifact {manifest.ref}", f"{name} {damage}", f"{step}: it is made anew")
            for role, ref in manifest.inputs.items():
                if ref.id not in self.manifests:
                    problem = f"its input {role!r}, {ref}, has no readable manifest"
                    self.add(severity, f"artifact {manifest.ref}", problem, f"{step}: it is made anew")

    def check_left_over(self) -> None:
        """Count what `gc` could take."""
        named = _named_blobs(self.manifests.values())
        orphans = {path: size for path, size in self.sizes.items() if path not in named}
        if orphans:
            self.add("reclaimable", f"{len(orphans)} files ({sum(orphans.values()):,} bytes)", "no artifact names them",
                     "none: a run that was cut short finds them again when it goes on")  # fmt: skip
        uploads = list(self.store.objects.uploads())
        if uploads:
            self.add("reclaimable", f"{len(uploads)} uploads", "never ended", "none")

    def problem_of(self, artifact_id: str) -> str | None:
        """Return what is wrong with an artifact, or None."""
        manifest = self.manifests.get(artifact_id)
        if manifest is None:
            return "has no readable manifest"
        for name, entry in manifest.files.items():
            damage = self.damage.get(blob_path(entry.sha256))
            if damage is not None:
                return f"is damaged: {name} {damage}"
        return None


def check(store: ArtifactStore, *, deep: bool = True, repair: bool = False) -> FsckReport:
    """Check everything in the store.

    Args:
        store: The store.
        deep: Read and hash every file; else only look up sizes.
        repair: Restore damaged files from the local cache where it has them, else forget the stage
            results that need them, so that the next run makes them again. Damaged checkpoints go.

    Raises:
        StorageError: The server does not answer.
    """
    state = _Check(store, deep=deep, repair=repair)
    state.read_manifests()
    state.check_blobs()
    state.check_stages()
    state.check_pointers()
    state.check_artifacts()
    state.check_checkpoints()
    state.check_left_over()
    return FsckReport(
        findings=tuple(state.findings), num_artifacts=len(state.manifests), num_blobs=len(state.sizes),
        num_bytes=sum(state.sizes.values()), num_names=state.num_names, num_checkpoints=state.num_checkpoints,
        is_deep=deep,
    )  # fmt: skip


def gc(store: ArtifactStore, *, dry_run: bool, min_age_s: float = MIN_AGE_S) -> Reclaimed:
    """Take what is left over and old: files no artifact names, ended stages' checkpoints, broken uploads.

    Args:
        store: The store.
        dry_run: Only tell what would be taken.
        min_age_s: Nothing younger is taken; below a day no run may be under way.

    Raises:
        IntegrityError: A manifest is not readable, so that nobody knows which files it names.
    """
    old = [each for each in store.objects.list("blobs/") if each.age_s >= min_age_s]
    named = _named_blobs(store.manifest(ref) for ref in store.list_artifacts())
    orphans = [each for each in old if each.path not in named]
    results = {each.path.rsplit("/", 1)[1].removesuffix(".json") for each in store.objects.list("stages/")}
    ended = [
        each for each in store.objects.list("checkpoints/")
        if each.age_s >= min_age_s and each.path.split("/")[1] in results
    ]  # fmt: skip
    uploads = [upload for upload in store.objects.uploads() if upload.age_s >= min_age_s]
    if not dry_run:
        for each in [*orphans, *ended]:
            head = store.objects.head(each.path)
            if head is not None and head.age_s >= min_age_s:  # else a commit has just written it anew
                store.objects.delete(each.path)
        for upload in uploads:
            store.objects.give_up(upload)
    return Reclaimed(
        num_blobs=len(orphans), num_bytes=sum(each.size_bytes for each in [*orphans, *ended]),
        num_uploads=len(uploads), num_checkpoint_files=len(ended), is_dry_run=dry_run,
    )  # fmt: skip


def _named_blobs(manifests: Iterable[Manifest]) -> set[str]:
    return {blob_path(entry.sha256) for manifest in manifests for entry in manifest.files.values()}


def _refs_in(value: Any) -> Iterator[ArtifactRef]:
    """Yield every artifact reference inside a JSON value."""
    if isinstance(value, dict):
        if set(value) == {"kind", "id"}:
            try:
                yield ArtifactRef.model_validate(value)
            except ValidationError:
                return
            return
        for each in value.values():
            yield from _refs_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _refs_in(each)
