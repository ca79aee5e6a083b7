"""What README and guides claim is current: table of methods, commands, snippets, links."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from tokred.__main__ import SCRIPTS, make_parser
from tokred.cli.methods import methods_markdown
from tokred.methods import registry

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
START, END = "<!-- methods:start -->", "<!-- methods:end -->"


def commands() -> list[str]:
    """Every `python -m tokred ...` of the bash blocks of all pages, continued lines joined."""
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"python -m tokred(\s|$)", line.split("#")[0])]


def test_the_table_of_methods_is_current():
    text = README.read_text()
    assert text.count(START) == text.count(END) == 1, f"README.md needs {START} and {END} once"
    table = text.split(START)[1].split(END)[0].strip()
    assert table == methods_markdown(), "run: python -m tokred methods --markdown"


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str):
    arguments = shlex.split(line.split("python -m tokred", 1)[1], comments=True)
    stops = (index for index, word in enumerate(arguments) if word in ("|", ">", "&&", ";"))
    arguments = arguments[: next(stops, len(arguments))]
    if arguments[0] in SCRIPTS:
        importlib.import_module(SCRIPTS[arguments[0]][0]).make_parser().read(arguments[1:])
    else:
        make_parser().parse_args(arguments)


def test_the_bench_command_is_shown():
    assert any("tokred bench" in line for line in commands())


def test_the_tables_of_pods_are_what_the_compiler_said():
    text, eight = ((ROOT / "docs" / name).read_text() for name in ("train.md", "tpu.md"))
    for row in json.loads((ROOT / "docs" / "pods.json").read_text()):
        memory = f"{row['arguments_mib']:.0f} + {row['temp_mib']:.0f}"
        line, page = f"| {memory} | {row['gflops']:.0f} | ", text
        if row["pod"] == "v5e-8":
            talk = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
            line, page = f"| {row['plan']} {line}{talk or '–'} |", eight
        else:
            line += " / ".join(str(count) for count in row["collectives"].values()) + " |"
        assert line in page, f"{row['pod']} {row['plan']}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    inside = [link for link in links if not re.match(r"[a-z]+:", link)]
    missing = [link for link in inside if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_run_one_after_another(page: Path, monkeypatch):
    """As by a reader who follows; those that load weights need files, methods and connectors that a
    page writes have tests of their own."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    known: dict = {"__name__": page.stem}
    for block in blocks:
        if "register" not in block and "load(" not in block:
            exec(compile(block, str(page), "exec"), known)


def test_there_are_snippets_to_run():
    assert sum(page.read_text().count("```python\n") for page in PAGES) >= 12
