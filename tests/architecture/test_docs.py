"""What the pages say is so: generated pages are fresh, links lead somewhere, commands exist, plug-ins load."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from ruamel.yaml import YAML

from pipeline_lib.config import load, read_yaml
from pipeline_lib.data.filters import FILTERS
from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.rule import Tools
from pipeline_lib.data.sources import SOURCES
from pipeline_lib.errors import ConfigError
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate import GatePolicy
from pipeline_lib.evaluation.gate_metrics import GATE_METRICS
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.generation import GENERATORS
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.registry import Table
from pipeline_lib.schema import ExampleResult, Message, Origin, Record, Response
from pipeline_lib.stages import STAGES
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.training.rewards import REWARD_SOURCES
from pipeline_lib.validation import validate

ROOT = Path(__file__).resolve().parents[2]
TABLES = [SOURCES, FILTERS, PREFERENCE_LOSSES, REWARD_LOSSES, REWARD_SOURCES, GENERATORS, GATE_METRICS]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GATES = sorted((ROOT / "configs" / "gates").glob("*.yaml"))
_LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
_COMMAND = re.compile(r"(?:^|`|\s{4}|\$ )prefline ([a-z][a-z-]*)([^`\n]*)")
_MAKE = re.compile(r"(?:^\s{4}|`)make ([a-z]+)", re.MULTILINE)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generated() -> dict[Path, str]:
    """The generated pages as they would be written now."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "infra" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages: dict[Path, str] = module.pages()
    return pages


@pytest.mark.parametrize("name", ["configuration.md", "errors.md"])
def test_generated_pages_are_fresh(generated: dict[Path, str], name: str) -> None:
    path = ROOT / "docs" / name
    assert path.read_text(encoding="utf-8") == generated[path], "run `make docs`"


def test_every_key_of_the_configuration_is_described(generated: dict[Path, str]) -> None:
    page = generated[ROOT / "docs" / "configuration.md"]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    undescribed = [row.split("`")[1] for row in rows if row.rstrip().endswith("|  |")]
    assert len(rows) > 150
    # The word itself says it: who wrote a response is a human, documentation or a model.
    assert set(undescribed) <= {"author.kind"}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [first or second for first, second in _LINK.findall(page.read_text(encoding="utf-8"))]
    missing = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            missing.append(target)
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are commonly made."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_files_named_in_code_marks_exist(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    # The headings of docs/adding name the files that the reader is about to write.
    text = "\n".join(line for line in lines if not (line.startswith("## ") and page.parent.name == "adding"))
    named = re.findall(r"`((?:pipeline_lib|flows|tasks|configs|infra|tests|docs)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_commands_exist(page: Path) -> None:
    from flows.cli import app

    group = typer.main.get_command(app)
    known: dict[str, Any] = getattr(group, "commands", {})
    text = page.read_text(encoding="utf-8")
    wrong = []
    for command, rest in _COMMAND.findall(text):
        if command not in known:
            wrong.append(f"prefline {command}")
            continue
        options = {option for parameter in known[command].params for option in parameter.opts}
        wrong += [f"prefline {command} {word}" for word in re.findall(r"(--[a-z-]+)", rest) if word not in options]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wrong += [f"make {target}" for target in _MAKE.findall(text) if f"\n{target}:" not in makefile]
    assert [word for word in wrong if not word.endswith(("--debug", "--help"))] == []


@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_every_configuration_is_valid(path: Path) -> None:
    loaded = load(path, RunConfig)
    assert loaded.origins
    header = path.read_text(encoding="utf-8").splitlines()
    assert header[0].startswith("# Question:"), "the first line says what the run asks"
    assert len(header) <= 60


@pytest.mark.parametrize("path", GATES, ids=shown)
def test_every_gate_policy_is_valid(path: Path) -> None:
    assert validate(GatePolicy, read_yaml(path), where=str(path)).rules


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in TABLES for name in table],
    ids=lambda value: getattr(value, "kind", value),
)
def test_every_line_of_a_table_leads_to_a_plugin(table: Table, name: str) -> None:
    plugin = table[name]
    assert issubclass(plugin, BaseModel)
    assert plugin.model_config["frozen"] is True
    assert plugin.model_config["extra"] == "forbid"


@pytest.mark.parametrize("name", list(STAGES))
def test_every_line_of_the_table_of_stages_leads_to_a_stage(name: str) -> None:
    spec = STAGES[name]
    assert spec.version >= 1
    assert list(inspect.signature(spec.run).parameters) == ["config", "inputs", "context"]
    assert issubclass(getattr(spec.load(), spec.config_class), BaseModel)


def test_every_public_name_has_a_docstring(sources: list[Any]) -> None:
    missing = []
    for source in sources:
        if not ast.get_docstring(source.tree):
            missing.append(source.name)
        missing += [
            f"{source.place(node)} {node.name}" for node in public_names(source.tree) if not ast.get_docstring(node)
        ]
    assert missing == []


def public_names(tree: ast.Module) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the public classes and functions of a module, and the public methods of those classes."""
    found: list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = []
    for holder in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        if isinstance(holder, ast.ClassDef) and holder.name.startswith("_"):
            continue
        for node in holder.body:
            is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if is_definition and not node.name.startswith("_"):
                found.append(node)
    return found


# The guides of docs/adding are run: each adds the plug-in it shows, to a table of its own.

GUIDES = [("loss", "hinge:Hinge"), ("filter", "boilerplate:Boilerplate"), ("source", "csv_files:CsvFiles"),
          ("gate-rule", "refusals:Refusals"), ("reward", "politeness:Politeness")]  # fmt: skip


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what builds the plug-in that a guide shows, out of the guide's own text."""
    guide, place = request.param
    text = (ROOT / "docs" / "adding" / f"{guide}.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module, _, cls = place.partition(":")
    assert f"{module}.py`" in text
    (tmp_path / f"guide_{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    table = Table(guide, {"new": f"guide_{module}:{cls}"})
    return lambda **parameters: table.build({"name": "new", **parameters})


def guided(name: str) -> Any:
    """Choose a guide for a test."""
    chosen = [guide for guide in GUIDES if guide[0] == name]
    return pytest.mark.parametrize("example", chosen, indirect=True, ids=[name])


@guided("loss")
def test_the_guide_for_a_loss_adds_one(example: Any) -> None:
    import torch

    from pipeline_lib.losses.preference.contract import PairLogps

    values = dict.fromkeys(("ref_chosen_B", "ref_rejected_B", "chosen_tokens_B", "rejected_tokens_B"), torch.zeros(2))
    pairs = PairLogps(chosen_B=torch.tensor([3.0, -1.0]), rejected_B=torch.tensor([0.0, 1.0]), **values)
    assert example(beta=0.5).per_pair(pairs).tolist() == [0.0, 2.0]  # max(0, 1 - 1.5) and 1 + 1
    with pytest.raises(ConfigError, match="did you mean 'beta'"):
        example(betta=0.5)


@guided("filter")
def test_the_guide_for_a_filter_adds_one(example: Any) -> None:
    def record(*texts: str) -> Record:
        ranks = tuple(range(1, len(texts) + 1)) if len(texts) > 1 else ()
        question = (Message(role="user", content="Why?"),)
        return Record.create(
            question, tuple(Response(content=text) for text in texts), ranks, origin=Origin(source="s")
        )

    rule = example()
    assert rule.reject(record("As an AI language model, I do not know."), Tools()).code == "E_BOILERPLATE"
    assert rule.reject(record("Because.", "As an AI language model, no."), Tools()) is None
    assert rule.reject(record(), Tools()) is None


@guided("source")
def test_the_guide_for_a_source_adds_one(example: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,completion\nWhy?,Because.\nHow?\nWho?,Me.\n")
    source = example(path=str(tmp_path / "rows.csv"), fields={"prompt": "question"}, layout="prompt_completion")
    rows = list(source.rows(LocalPlaces(), lambda _: None))
    assert [getattr(row, "code", "record") for row in rows] == ["record", "E_CSV_COLUMNS", "record"]
    assert rows[0].messages[-1].content == "Why?"
    assert rows[0].responses[0].content == "Because."
    assert list(source.fingerprint(LocalPlaces())) == [str(tmp_path / "rows.csv")]


@guided("reward")
def test_the_guide_for_a_reward_adds_one(example: Any) -> None:
    from tests.unit.training.reward_samples import Heard, samples

    heard = Heard()
    assert example().score(samples("Thank you.", "So what", ""), heard.resources()) == [1.0, 0.0, None]
    assert heard.problems == [("row2", "the response is empty")]
    with pytest.raises(ConfigError, match="did you mean 'words'"):
        example(word=["please"])


@guided("gate-rule")
def test_the_guide_for_a_gate_rule_adds_a_metric(example: Any) -> None:
    def result(number: int, response: str) -> ExampleResult:
        return ExampleResult(
            record_id=str(number), prompt=(Message(role="user", content="?"),), reference="", response=response,
            response_tokens=1, is_finished=True, reference_nll_nats=None, reference_tokens=0, rouge_l_frac=None,
            score=0.0, logp=0.0, reference_model_logp=0.0,
        )  # fmt: skip

    answers = {"dpo": ["I cannot say.", "Yes.", "No.", "Maybe."], "base": ["I'm sorry.", "I can't.", "No.", "Maybe."]}
    models = {name: tuple(result(k, text) for k, text in enumerate(texts)) for name, texts in answers.items()}
    evidence = Evidence(models=models, reward_model={})
    assert example().measure(evidence, "dpo", bootstrap=Bootstrap()).value == 0.25
    assert example(against="base").measure(evidence, "dpo", bootstrap=Bootstrap()).value == -0.25


def test_the_guide_for_a_gate_rule_shows_a_valid_policy() -> None:
    text = (ROOT / "docs" / "adding" / "gate-rule.md").read_text(encoding="utf-8")
    (policy,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert validate(GatePolicy, YAML(typ="safe", pure=True).load(policy), where="the guide").min_examples == 100


def test_the_readmes_configuration_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example_yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(example_yaml)
    assert load(path, RunConfig).value.promote.model_name == "mine"
