"""Checkpoints: the newest valid one is taken, a damaged one is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_lib.errors import HeldError, IntegrityError
from pipeline_lib.storage.checkpoints import Checkpoints
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers

KEY = "ab" * 32


def folder(directory: Path, step: int) -> Path:
    (directory / "sub").mkdir(parents=True, exist_ok=True)
    (directory / "weights.safetensors").write_bytes(b"weights %d" % step)
    (directory / "sub" / "state.json").write_bytes(b'{"same": true}')
    return directory


@pytest.fixture
def checkpoints(store: ArtifactStore, tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 4, 8 and 12, of which two are kept."""
    checkpoints = Checkpoints(store, KEY)
    for step in (4, 8, 12):
        checkpoints.save(step, folder(tmp_path / "work", step), {"num_steps": 20})
    return checkpoints


def steps(checkpoints: Checkpoints) -> list[int]:
    """Return the step of every object of the stage."""
    start = f"checkpoints/{KEY}/"
    return sorted(int(each.path.removeprefix(start)[:8]) for each in checkpoints.store.objects.list(start))


def weights(checkpoints: Checkpoints, step: int) -> str:
    """Return the path of a checkpoint's weights."""
    start = f"checkpoints/{KEY}/{step:08d}/"
    return next(
        each.path for each in checkpoints.store.objects.list(start) if each.size_bytes == len(f"weights {step}")
    )


def test_none_at_first(store: ArtifactStore) -> None:
    assert Checkpoints(store, KEY).latest() is None


def test_the_newest_two_are_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.latest() == (12, {"num_steps": 20})
    # Of each, one manifest and two files.
    assert steps(checkpoints) == [8, 8, 8, 12, 12, 12]
    fetched = checkpoints.fetch(12, tmp_path / "out")
    assert (fetched / "weights.safetensors").read_bytes() == b"weights 12"
    assert (fetched / "sub" / "state.json").read_bytes() == b'{"same": true}'


@pytest.mark.parametrize("fault", ["flipped", "missing", "manifest"])
def test_a_damaged_one_is_refused_by_name(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    objects = checkpoints.store.objects
    match fault:
        case "flipped":
            objects.put(weights(checkpoints, 12), b"weightz 12")
        case "missing":
            objects.delete(weights(checkpoints, 12))
        case "manifest":
            objects.put(f"checkpoints/{KEY}/00000012.json", b'{"step": 12')
    assert checkpoints.latest() == (8, {"num_steps": 20})
    assert "checkpoint 12 of stage abababababab is refused" in caplog.text
    with pytest.raises(IntegrityError, match=r"checkpoint (of step )?12"):
        checkpoints.fetch(12, tmp_path / "out")
    assert checkpoints.fetch(8, tmp_path / "out8").joinpath("weights.safetensors").read_bytes() == b"weights 8"


def test_a_run_that_resumed_overwrites_what_was_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Step 12 is damaged, so the run goes on from 8; no step after its own survives its next save."""
    checkpoints.store.objects.put(weights(checkpoints, 12), b"weightz 12")
    checkpoints.save(10, folder(tmp_path / "work", 10), {})
    assert steps(checkpoints) == [8, 8, 8, 10, 10, 10]
    checkpoints.save(12, folder(tmp_path / "work", 12), {})
    assert checkpoints.latest() == (12, {})


def test_one_without_its_manifest_is_not_there(checkpoints: Checkpoints) -> None:
    """As after a kill between the files and the manifest."""
    checkpoints.store.objects.delete(f"checkpoints/{KEY}/00000012.json")
    assert checkpoints.latest() == (8, {"num_steps": 20})


def test_clear_takes_everything_of_this_stage_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    other = Checkpoints(checkpoints.store, "cd" * 32)
    other.save(1, folder(tmp_path / "work", 1), {})
    checkpoints.clear()
    assert checkpoints.latest() is None
    assert steps(checkpoints) == []
    assert other.latest() == (1, {})


class Lost:
    def assert_held(self) -> None:
        raise HeldError("taken over", next_step="none")


def test_a_lost_lease_stops_a_save(store: ArtifactStore, tmp_path: Path) -> None:
    fenced = Checkpoints(store, KEY, lease=Lost())
    with pytest.raises(HeldError):
        fenced.save(4, folder(tmp_path / "work", 4), {})
    assert fenced.latest() is None
