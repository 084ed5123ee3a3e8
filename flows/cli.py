"""The command `prefline`: run, look, explain, check, serve."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline_lib.errors import InterruptedRunError, PipelineError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Align language models with human preferences: one resumable pipeline, from rows to a promoted model.",
)  # fmt: skip

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a preset in configs/.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key.path=value; may be given several times.")]
Home = Annotated[Path, typer.Option("--home", envvar="PREFLINE_HOME", help="Folder of the embedded servers.")]
OptionalHome = Annotated[
    Path | None, typer.Option("--home", envvar="PREFLINE_HOME", help="Folder of the embedded servers (runtime.home).")
]
DEFAULT_HOME = Path(".prefline")
_TYPER_INTERRUPTED = 130


@app.command()
def run(config: Config, overrides: Overrides = None, home: OptionalHome = None) -> None:
    """Run the pipeline, or what is left of it, and print what came out."""
    loaded = _load(config, [*(overrides or []), *([f"runtime.home={home}"] if home is not None else [])])
    started = time.monotonic()
    with _flow_services(loaded.runtime.home):
        from flows.align import align

        result = align(loaded)
    print(_summary(result, home=loaded.runtime.home, seconds=time.monotonic() - started))


@app.command()
def iterate(
    config: Config,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in all; those that are finished are not run again.")] = 2,
    overrides: Overrides = None,
    home: OptionalHome = None,
) -> None:
    """Run the pipeline in rounds, each from the model that the one before led to."""
    loaded = _load(config, [*(overrides or []), *([f"runtime.home={home}"] if home is not None else [])])
    with _flow_services(loaded.runtime.home):
        from flows.iterate import iterate as iterate_flow

        results = iterate_flow(loaded, rounds)
    for result in results:
        print(f"Round {result.start.number}: {result.status.replace('_', ' ')} ({result.reason})")
        print(f"  from {result.start.model or 'the base model'} to {result.model or 'the base model again'}")
    if results[-1].model is not None:
        there = _with_home(loaded.runtime.home)
        print(
            f"Next:\n  prefline explain {results[-1].model.id[:12]}{there}     the model's lineage, through all rounds"
        )


@app.command("show-config")
def show_config(config: Config, overrides: Overrides = None) -> None:
    """Print every value of a configuration and where it comes from."""
    from pipeline_lib.config import find_config, flatten, load
    from pipeline_lib.stages.run_config import RunConfig

    loaded = load(find_config(config), RunConfig, overrides)
    for key, value in flatten(loaded.value.model_dump(mode="json")).items():
        origin = next(
            (place for name, place in loaded.origins.items() if key == name or key.startswith(f"{name}.")), "default"
        )
        print(f"{key} = {json.dumps(value, ensure_ascii=False)}  ({origin})")


@app.command()
def diff(first: Config, second: Annotated[str, typer.Argument(help="The other configuration.")]) -> None:
    """Print the values in which two configurations differ."""
    from pipeline_lib.config import differences

    for key, (left, right) in differences(_load(first, []), _load(second, [])).items():
        print(f"{key}: {json.dumps(left)} -> {json.dumps(right)}")


@app.command("list")
def list_plugins(
    kind: Annotated[
        str,
        typer.Argument(help="sources, filters, losses, reward-losses, rewards, generators, gate-metrics or stages."),
    ],
) -> None:
    """Print the plug-ins of a kind with their parameters."""
    from flows.listing import describe

    print(describe(kind))


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help="models:/NAME@alias, models:/NAME/VERSION, or an artifact's id.")],
    home: Home = DEFAULT_HOME,
    rows: Annotated[int, typer.Option(help="Training rows to print with their sources.")] = 3,
) -> None:
    """Print the lineage of a model version, back to sources, rows and configuration."""
    from flows.explain import explain as explain_target

    print(explain_target(target, home=home, num_rows=rows))


@app.command()
def fsck(
    home: Home = DEFAULT_HOME,
    repair: Annotated[bool, typer.Option(help="Forget stage results whose files are damaged.")] = False,
) -> None:
    """Check every artifact's hashes and every pointer."""
    from pipeline_lib.storage.fsck import check
    from tasks.services import open_store

    with open_store(home) as (_, store):
        report = check(store, repair=repair)
    print(report.in_words())
    if report.num_errors:
        raise typer.Exit(23)


@app.command()
def gc(
    home: Home = DEFAULT_HOME,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
) -> None:
    """Remove files older than a day that no artifact names, and broken uploads."""
    from pipeline_lib.storage.fsck import gc as collect_garbage
    from tasks.services import open_store

    with open_store(home) as (_, store):
        took = collect_garbage(store, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    print(
        f"{verb} {took.num_blobs} files ({took.num_bytes / (1 << 20):.1f} MiB), "
        f"{took.num_checkpoint_files} files of ended checkpoints, {took.num_uploads} broken uploads"
    )


@app.command()
def rollback(config: Config, home: OptionalHome = None) -> None:
    """Make the former champion champion again, and bar the present one."""
    from pipeline_lib.stages.promote import roll_back
    from pipeline_lib.tracking import ModelRegistry
    from tasks.services import open_store, tracking_settings

    loaded = _load(config, [])
    promote_config, place = loaded.promote, home or loaded.runtime.home
    with open_store(place) as (storage, store):
        registry = ModelRegistry(tracking_settings(place, storage))
        champion = roll_back(promote_config, store=store, registry=registry)
    print(f"{promote_config.model_name}@{promote_config.alias} is {champion.model} again")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask the model.")],
    model: Annotated[str, typer.Option(help="A model URI of the registry.")] = "models:/prefline-demo@champion",
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer, at most.")] = 64,
    home: Home = DEFAULT_HOME,
) -> None:
    """Load a promoted model from the registry and let it answer."""
    os.environ["TQDM_DISABLE"] = "1"
    from pipeline_lib.tracking import load_pipeline
    from tasks.services import open_store, tracking_settings

    with open_store(home) as (storage, _):
        answer = load_pipeline(tracking_settings(home, storage), model)
        reply = answer([{"role": "user", "content": question}], max_new_tokens=max_new_tokens, do_sample=False)
    print(reply[0]["generated_text"][-1]["content"])


@app.command()
def up(
    home: Home = DEFAULT_HOME,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's UI.")] = 5000,
) -> None:
    """Start the embedded servers with their pages, serve the presets as deployments, until Ctrl-C."""
    from flows.embedded import prefect_api
    from flows.pages import mlflow_pages
    from flows.served import served_presets
    from tasks.services import open_store, tracking_settings

    with _interruptible(), open_store(home) as (storage, _), prefect_api(home, port=prefect_port) as api:
        settings = tracking_settings(home, storage)
        with mlflow_pages(settings, home, port=mlflow_port) as pages, served_presets(home):
            print(f"Prefect  {api.removesuffix('/api')}\nMLflow   {pages}\nS3       {storage.endpoint_url}")
            print('Ctrl-C ends them. Other terminals: eval "$(prefline env)"', flush=True)
            ends = {signal.SIGINT, *_ends()}
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # one that is not blocked ends the process unseen
            signal.sigwait(ends)


@app.command()
def env(home: Home = DEFAULT_HOME) -> None:
    """Print the variables by which other programs find the servers that `prefline up` keeps."""
    from flows.pages import environment_of

    for key, value in environment_of(home).items():
        print(f"export {key}={value}")


def _load(config: str, overrides: list[str]) -> Any:
    from pipeline_lib.config import find_config, load
    from pipeline_lib.stages.run_config import RunConfig

    return load(find_config(config), RunConfig, overrides).value


@contextlib.contextmanager
def _flow_services(home: Path) -> Iterator[None]:
    """Hold what a flow needs while the block runs: Prefect's API, bars on the terminal, Ctrl-C that commits."""
    from flows.embedded import prefect_api
    from tasks.interrupts import lasting_interrupts
    from tasks.progress import console

    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _interruptible(), lasting_interrupts(), prefect_api(home):
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        console.start()
        try:
            yield
        finally:
            console.stop()
            APILogWorker.drain_all()  # before the embedded server ends
            EventsWorker.drain_all()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGTERM, and a closed terminal, into KeyboardInterrupt, so that they take the way of Ctrl-C."""
    before = {number: signal.signal(number, _raise_interrupt) for number in _ends()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ends() -> list[signal.Signals]:
    """Return the signals that end a command besides Ctrl-C; under `nohup` a closed terminal does not."""
    return [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]


def _raise_interrupt(number: int, frame: object) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _with_home(home: Path) -> str:
    """Return what a command needs to find a home that is not the usual one."""
    return "" if home == DEFAULT_HOME else f" --home {shlex.quote(str(home))}"


def _summary(result: Any, *, home: Path, seconds: float) -> str:
    promotion, verdict = result.promotion, result.verdict
    lines = ["", f"Gate: {promotion.status.replace('_', ' ')} ({promotion.reason})"]
    for candidate in verdict.candidates:
        lines.append(f"  {candidate.name}: {'passed' if candidate.is_passed else 'failed'}")
        for rule in candidate.rules:
            mark = {"pass": "+", "fail": "x", "not_applicable": "-"}[rule.status]
            lines.append(f"    {mark} {rule.rule}: {rule.reason}")
    name, there = f"{promotion.model_name}@{promotion.alias}", _with_home(home)
    if promotion.version is not None:
        lines += [
            f"Model:     {promotion.model_name} version {promotion.version}, alias {promotion.alias}",
            f"Artifacts: {result.winner_uri}",
        ]
    lines += [f"Report:    {result.report_path}", f"Took {seconds:.0f} s.", "", "Next:"]
    if promotion.version is None:
        rejected = next(candidate for candidate in verdict.candidates)
        lines += [
            f"  prefline explain {rejected.model.id[:12]}{there}     a rejected candidate's lineage, back to its rows"
        ]
    else:
        lines += [
            f"  prefline explain models:/{name}{there}     the model's lineage, back to its rows",
            f'  prefline ask "What does shutil.copytree do?" --model models:/{name}{there}',
        ]
    lines += [f"  prefline up{there}                         the runs in Prefect and MLflow; start runs by form"]
    return "\n".join(lines)


def main() -> None:
    """Run the command line; errors end it with their own exit code and two lines."""
    is_debug = "--debug" in sys.argv
    if is_debug:
        sys.argv.remove("--debug")
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO if is_debug else logging.ERROR)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[handler])
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        # Typer answers Ctrl-C and `typer.Exit` with a code instead of raising.
        code = app(standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except PipelineError as error:
        _fail(error, is_debug=is_debug)
    except KeyboardInterrupt:
        print(
            "interrupted: what a stage has trained is in its last checkpoint\n"
            "  next: run the same command again, it goes on from there",
            file=sys.stderr,
        )
        sys.exit(InterruptedRunError.exit_code)
    except Exception as error:
        cause = _pipeline_error_in(error)
        if cause is not None:
            _fail(cause, is_debug=is_debug)
        if is_debug or not hasattr(error, "format_message"):
            if is_debug:
                traceback.print_exc()
            print(
                f"{type(error).__name__}: {error}\n  next: run again with --debug, and report it with the trace",
                file=sys.stderr,
            )
            sys.exit(1)
        print(f"{error.format_message()}\n  next: prefline --help", file=sys.stderr)
        sys.exit(2)


def _fail(error: PipelineError, *, is_debug: bool) -> None:
    if is_debug:
        traceback.print_exception(error)
    print(str(error), file=sys.stderr)
    sys.exit(error.exit_code)


def _pipeline_error_in(error: BaseException | None) -> PipelineError | None:
    """Find our error behind one that Prefect wrapped around it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, PipelineError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
