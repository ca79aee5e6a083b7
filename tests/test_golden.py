"""The golden runner: every stored case passes, and the record says how many."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.golden import RECORD, CaseFile, find_cases, run_case, summary
from tokred.methods import list_methods

FOLDER = Path(__file__).parent / "golden"
FILES = list(find_cases(FOLDER))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_case(file: CaseFile):
    outcome = run_case(file)
    assert outcome.status == "passed", outcome.note
    assert outcome.group == file.group


def test_the_record_counts_the_cases_that_all_pass():
    assert json.loads(RECORD.read_text()) == Counter(file.group for file in FILES)


def test_methods_name_the_recorded_groups():
    named = {group for method in list_methods() for group in method.golden}
    assert named == set(json.loads(RECORD.read_text()))


def corrupted(path: Path, to: Path) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["out_mean"] = arrays["out_mean"] + 1e-2
    np.savez(to, **arrays)


def test_runner_fails_on_a_corrupted_case_and_skips_unknown_groups(tmp_path):
    """In a folder of no family's name, as held-back cases may come."""
    case = FOLDER / "vit" / "tome_kth__k2.npz"
    corrupted(case, tmp_path / "tome_kth__bad.npz")
    shutil.copy(case, tmp_path / "tome_kth__good.npz")
    shutil.copy(case, tmp_path / "unheard_of__k2.npz")
    command = [sys.executable, "-m", "tests.golden", str(tmp_path)]
    run = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert run.stdout.splitlines()[-1] == "1 passed, 1 failed, 1 skipped"
    assert "skipped: no adapter" in run.stdout
    only = [*command, "--only", "*good*,unheard*"]
    run = subprocess.run(only, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_a_group_of_two_families_is_told_by_its_arrays(tmp_path):
    for family, name in (("core", "dynamicvit__a"), ("vit", "dynamicvit__n13")):
        shutil.copy(FOLDER / family / f"{name}.npz", tmp_path)
    outcomes = [run_case(file) for file in find_cases(tmp_path)]
    assert summary(outcomes) == "2 passed, 0 failed, 0 skipped"
    assert [o.group for o in outcomes] == ["core/dynamicvit", "vit/dynamicvit"]
