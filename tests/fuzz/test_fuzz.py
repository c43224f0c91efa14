"""The fuzzer in the test suite: no failure of an unknown kind, and the known kinds still occur.

METAIMPLICIT_FUZZ_CASES is the number of cases (60 by default), METAIMPLICIT_FUZZ_SEED their seed.
"""

import ast
import os
from pathlib import Path

import pytest

from fuzz.cases import draw
from fuzz.known import KNOWN, kind_of
from fuzz.verdicts import UNDECIDED, judge

CASES = int(os.environ.get("METAIMPLICIT_FUZZ_CASES", "60"))
SEED = int(os.environ.get("METAIMPLICIT_FUZZ_SEED", "0"))
CHUNK = 15
PINNED = [(name, case) for name, kind in KNOWN.items() for case in kind.pinned]
PLAIN_TORCH = ("case", "cases", "dense", "kronecker", "losses", "models", "oracles", "problems")


@pytest.mark.parametrize("start", range(0, CASES, CHUNK))
def test_no_failure_is_of_an_unknown_kind(start):
    verdicts = [judge(draw(SEED, index)) for index in range(start, min(start + CHUNK, CASES))]

    unknown = [str(v) for v in verdicts if v.bad and kind_of(v) is None]
    assert not unknown, "\n".join(unknown)
    # an undecided case checks nothing
    undecided = [str(v) for v in verdicts if v.kind == UNDECIDED]
    assert len(undecided) <= CHUNK // 3, "\n".join(undecided)


@pytest.mark.parametrize(("name", "case"), PINNED, ids=[name for name, _ in PINNED])
def test_a_known_kind_still_occurs(name, case):
    verdict = judge(case)
    assert KNOWN[name].matches(verdict), f"{name!r} is mended, delete its row: {verdict}"


def test_a_case_depends_on_its_seed_and_index_alone():
    cases = [draw(7, index) for index in range(20)]
    assert draw(7, 13) == cases[13]
    assert draw(8, 13) != cases[13]
    assert judge(cases[0]).reason == judge(cases[0]).reason


def test_the_oracles_import_nothing_of_the_project():
    for name in PLAIN_TORCH:
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
        modules = [
            *(node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)),
            *(
                a.name
                for node in ast.walk(tree)
                if isinstance(node, ast.Import)
                for a in node.names
            ),
        ]
        assert not [module for module in modules if module.startswith("metaimplicit")], name
        assert not {"fuzz.subject", "fuzz.verdicts", "fuzz.known"} & set(modules), name
