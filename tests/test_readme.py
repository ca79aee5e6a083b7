"""What the README claims is current: its table of methods, and its commands."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from tokred.__main__ import SCRIPTS, make_parser
from tokred.cli.methods import methods_markdown
from tokred.methods import registry

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- methods:start -->", "<!-- methods:end -->"


def commands() -> list[str]:
    """Every `python -m tokred ...` of the bash blocks, continued lines joined."""
    if not README.exists():
        return []
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", README.read_text(), re.DOTALL)
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


def test_the_table_of_pods_is_what_the_compiler_said():
    text = README.read_text()
    for row in json.loads((README.parent / "docs" / "pods.json").read_text()):
        memory = f"{row['arguments_mib']:.0f} + {row['temp_mib']:.0f}"
        talk = " / ".join(str(count) for count in row["collectives"].values())
        line = f"| {memory} | {row['gflops']:.0f} | {talk} |"
        assert line in text, f"{row['pod']} {row['plan']}: {line}"


@pytest.mark.slow
def test_the_snippets_run_one_after_another(monkeypatch):
    """As by a reader who follows; those that load weights need files, the README's own methods have
    tests of their own."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    ours = [block for block in blocks if "register" not in block and "load(" not in block]
    known: dict = {"__name__": "readme"}
    for block in ours:
        exec(compile(block, str(README), "exec"), known)
    assert len(ours) >= 8 and len(blocks) - len(ours) <= 4
