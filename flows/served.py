"""The presets as deployments of `prefline up`: runs are started by hand in Prefect's pages.

Run as `python -m flows.served HOME`; a run is a process of its own, on this machine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.pages import end_group
from pipeline_lib.processes import die_with_parent

PRESETS = ("smoke", "demo", "hh-rlhf")
"""Configurations that a form starts out with."""


@contextmanager
def served_presets(home: Path) -> Iterator[None]:
    """Serve the presets from a child process while the block runs."""
    with (home / "logs" / "served.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.served", str(home.absolute())],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        yield
    finally:
        end_group(process)


def main(home: str) -> None:
    """Register one deployment a preset and run what is started, until the process is told to end."""
    from prefect import serve  # noqa: PLC0415  (the parent needs no Prefect client)

    from flows.align import align  # noqa: PLC0415
    from pipeline_lib.config import find_config, load  # noqa: PLC0415
    from pipeline_lib.stages.run_config import RunConfig  # noqa: PLC0415

    deployments = []
    for preset in PRESETS:
        config = load(find_config(preset), RunConfig, [f"runtime.home={home}"]).value
        deployments.append(
            align.to_deployment(
                name=preset,
                description=f"One round with the configuration `{preset}`; change any value in the form.",
                parameters={"config": config.model_dump(mode="json")},
                tags=["prefline"],
            )
        )
    serve(*deployments, limit=1, print_starting_message=False)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1])
