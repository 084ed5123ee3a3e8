"""A disk that cannot be written and files that cannot be opened: the stage ends with a name and a next step."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_lib.errors import DiskAccessError, PipelineError
from pipeline_lib.stages.execute import as_pipeline_error

OPENS_TOO_MANY = """
import resource
from pipeline_lib.stages.execute import as_pipeline_error
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
files = []
try:
    while True:
        files.append(open({path!r}, "w"))
except OSError as error:
    found = as_pipeline_error(error)
print(type(found).__name__, found.exit_code, found.cause, found.next_step, sep="|")
"""


def test_too_many_open_files(tmp_path: Path) -> None:
    program = OPENS_TOO_MANY.format(path=str(tmp_path / "file"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    name, exit_code, cause, next_step = done.stdout.strip().split("|")
    assert (name, exit_code) == ("DiskAccessError", "27")
    assert cause == f"{tmp_path / 'file'} cannot be opened: {os.strerror(errno.EMFILE)}"
    assert "ulimit -n" in next_step


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    place, mount = tmp_path / "disk", shutil.which("mount")
    place.mkdir()
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(OSError, match="Read-only") as caught:
            (place / "file").write_text("x")
    finally:
        subprocess.run(["umount", str(place)], check=True)
    found = as_pipeline_error(caught.value)
    assert isinstance(found, DiskAccessError)
    assert found.cause == f"{place / 'file'} may not be written: {os.strerror(errno.EROFS)}"
    assert "runtime.home" in found.next_step


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE])
def test_every_one_has_the_code(code: int) -> None:
    found = as_pipeline_error(OSError(code, os.strerror(code), "place"))
    assert isinstance(found, DiskAccessError)
    assert found.cause.startswith("place ")


def test_what_is_a_bug_stays_a_bug() -> None:
    error = FileNotFoundError(errno.ENOENT, "gone", "place")
    assert as_pipeline_error(error) is error
    assert not isinstance(as_pipeline_error(error), PipelineError)
