"""The fuzzer in the test suite: nothing is wrong without a word, or fails in torch's own words.

METAIMPLICIT_FUZZ_CASES is the number of cases (10 by default), METAIMPLICIT_FUZZ_SEED their seed.
"""

import ast
import os
from pathlib import Path

import pytest

from fuzz.cases import draw
from fuzz.verdicts import UNDECIDED, judge

CASES = int(os.environ.get("METAIMPLICIT_FUZZ_CASES", "10"))
SEED = int(os.environ.get("METAIMPLICIT_FUZZ_SEED", "0"))
CHUNK = 10
PLAIN_TORCH = ("case", "cases", "dense", "kronecker", "losses", "models", "oracles", "problems")


@pytest.mark.parametrize("start", range(0, CASES, CHUNK))
def test_every_case_is_right_or_says_that_it_is_not(start):
    verdicts = [judge(draw(SEED, index)) for index in range(start, min(start + CHUNK, CASES))]

    bad = [str(verdict) for verdict in verdicts if verdict.bad]
    assert not bad, "\n".join(bad)
    # an undecided case checks nothing
    undecided = [str(v) for v in verdicts if v.kind == UNDECIDED]
    assert len(undecided) <= CHUNK // 3, "\n".join(undecided)


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
        assert not {"fuzz.subject", "fuzz.verdicts"} & set(modules), name
