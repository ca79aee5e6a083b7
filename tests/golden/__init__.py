"""Golden parity: stored cases of official implementations against tokred's public functions.

A case is a file FAMILY/GROUP_variant.npz of arrays: `in_*` inputs, `param_*` weights under their
official names, `cfg_*` scalars and short lists, `out_*` what the official code gave. An adapter
turns a case into the same `out_*` by calling tokred; see `tests/golden_adapters`.
"""

import fnmatch
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.golden_adapters import FAMILIES
from tests.golden_adapters.case import Adapter, Case, Output, exact

RECORD = Path(__file__).parents[2] / "tokred" / "methods" / "golden_passed.json"


class Outcome(NamedTuple):
    """What one case gave: status is 'passed', 'failed' or 'skipped', group 'family/group'."""

    case: str
    status: str
    note: str
    group: str = ""

    def __str__(self) -> str:
        return f"{self.case}: {self.status}: {self.note}"


@dataclass(frozen=True)
class CaseFile:
    """A stored case and the families that its adapter is looked for in."""

    path: Path
    families: tuple[str, ...]

    @property
    def name(self) -> str:
        return "/".join((*self.families, self.path.stem)[-2:])

    @cached_property
    def adapters(self) -> list[tuple[str, Adapter]]:
        """(group, adapter): per family the longest group that the file name starts with."""
        found = []
        for family in self.families:
            groups = [g for g in FAMILIES[family] if f"{self.path.stem}_".startswith(f"{g}_")]
            if groups:
                group = max(groups, key=len)
                found.append((f"{family}/{group}", FAMILIES[family][group]))
        return found

    @property
    def group(self) -> str:
        """That of its first adapter, without running it; '' without one."""
        for group, adapter in self.adapters[:1]:
            return adapter.group(Case.load(self.path)) or group
        return ""


def find_cases(folder: Path) -> Iterator[CaseFile]:
    """The cases of `folder`: its subfolders are families, or it is one, or it may be any."""
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        family = (sub.name,) if sub.name in FAMILIES else ()
        yield from (CaseFile(path, family) for path in sorted(sub.glob("*.npz")))
    families = (folder.name,) if folder.name in FAMILIES else tuple(FAMILIES)
    yield from (CaseFile(path, families) for path in sorted(folder.glob("*.npz")))


def run_case(file: CaseFile) -> Outcome:
    """Compares one case; the first adapter whose arrays the case holds decides."""
    if not file.adapters:
        return Outcome(file.name, "skipped", "no adapter")
    case = Case.load(file.path)
    for group, adapter in file.adapters:
        try:
            got = adapter(case)
        except KeyError as error:
            outcome = Outcome(file.name, "failed", f"the case lacks {error}", group)
        except Exception as error:
            return Outcome(file.name, "failed", f"{type(error).__name__}: {error}", group)
        else:
            return compare(file.name, adapter.group(case) or group, case.outputs, got, adapter)
    return outcome


def compare(
    name: str,
    group: str,
    wanted: Mapping[str, np.ndarray],
    got: Mapping[str, Any],
    adapter: Adapter,
) -> Outcome:
    """Every stored output against what tokred gave; one that an adapter omits is a failure."""
    errors, failures = [0.0], []
    for output, want in wanted.items():
        if output not in got:
            failures.append(f"{output} is not computed")
            continue
        rule = adapter.rule(output) if want.dtype.kind == "f" else adapter.rules.get(output, exact)
        error, fits = difference(want, got[output], rule)
        errors.append(error)
        if not fits:
            failures.append(f"{output} is off by {error:.2e}")
    rule = adapter.rule("")
    note = f"max error {max(errors):.1e} (rtol {rule.rtol:g}, atol {rule.atol:g})"
    note = "; ".join([note, *failures])
    return Outcome(name, "failed" if failures else "passed", note, group)


def difference(want: np.ndarray, got: Any, rule: Output) -> tuple[float, bool]:
    """(largest absolute difference, whether all are within the tolerance)."""
    want, got = rule.prepare(want.astype(np.float64), np.asarray(got, np.float64))
    if want.shape != got.shape:
        return float("inf"), False
    gap = np.abs(want - got)
    return float(gap.max(initial=0.0)), bool((gap <= rule.atol + rule.rtol * np.abs(want)).all())


def selected(files: Iterator[CaseFile], globs: Sequence[str]) -> Iterator[CaseFile]:
    """The cases whose file name fits one of `globs`; all without any."""
    return (f for f in files if not globs or any(fnmatch.fnmatch(f.path.stem, g) for g in globs))


def passed_by_group(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Passed cases by 'family/group', sorted: what `--record` stores."""
    return dict(sorted(Counter(o.group for o in outcomes if o.status == "passed").items()))


def record(outcomes: Sequence[Outcome]) -> None:
    RECORD.write_text(json.dumps(passed_by_group(outcomes), indent=2) + "\n")


def summary(outcomes: Sequence[Outcome]) -> str:
    count = Counter(o.status for o in outcomes)
    return ", ".join(f"{count[status]} {status}" for status in ("passed", "failed", "skipped"))


def set_precision() -> None:
    """Float32 with the highest matmul precision, and compiled programs kept on disk."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_compilation_cache_dir", str(RECORD.parents[2] / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
