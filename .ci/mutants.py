"""Break the code at random places, one at a time, and count the mutants that the tests kill.

python .ci/mutants.py --seed 0 --count 60        # one to two hours on two cores

The test that failed is named. If it has nothing to do with the mutant, it failed for another
reason, and the mutant does not count as killed.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("solvers", "operators", "methods", "inner", "hypergradient.py")
SWAPS = {
    **{"+": "-", "-": "+", "*": "/", "/": "*", "**": "*", "@": "*"},
    **{"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="},
    **{"and": "or", "or": "and", "not": "", "True": "False", "False": "True"},
}
TIME_LIMIT = 900  # seconds; a mutant that hangs counts as killed


@dataclass(frozen=True)
class Mutant:
    """One token of a file and what replaces it."""

    path: Path  # relative to the root of the project
    text: str  # of the whole file
    line: int
    column: int
    before: str
    after: str

    def source(self) -> str:
        """The text of the mutated file."""
        lines = self.text.splitlines(keepends=True)
        line = lines[self.line - 1]
        end = self.column + len(self.before)
        lines[self.line - 1] = line[: self.column] + self.after + line[end:]
        return "".join(lines)

    def compiles(self) -> bool:
        """Whether the mutated file is still Python."""
        try:
            compile(self.source(), str(self.path), "exec")
        except SyntaxError:
            return False
        return True

    def __str__(self) -> str:
        line = self.text.splitlines()[self.line - 1].strip()
        return f"{self.path}:{self.line} {self.before!r} → {self.after!r} in: {line}"


def replacement(token: tokenize.TokenInfo) -> str | None:
    """What replaces a token, or None if nothing does."""
    if token.type == tokenize.NUMBER:
        value = float(token.string) if "." in token.string or "e" in token.string else None
        return str(int(token.string) + 1) if value is None else str(2 * value + (value == 0))
    if token.type in (tokenize.OP, tokenize.NAME):
        return SWAPS.get(token.string)
    return None


def all_mutants() -> list[Mutant]:
    """Every mutant of the files in `PARTS`, in the order of their text."""
    package = ROOT / "metaimplicit"
    roots = [package / part for part in PARTS]
    files = [f for root in roots for f in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
    mutants = []
    for path in files:
        text = path.read_text()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            after = replacement(token)
            if after is not None:
                line, column = token.start
                mutants.append(
                    Mutant(
                        path=path.relative_to(ROOT),
                        text=text,
                        line=line,
                        column=column,
                        before=token.string,
                        after=after,
                    )
                )
    return mutants


def first_failure(mutant: Mutant, tree: Path, workers: int) -> str:
    """What fails first on a copy of the project with the mutant in it. Empty if nothing does."""
    target = tree / mutant.path
    write_source(target, mutant.source())
    # The tests of the mutated package run first, because they are the likeliest to fail.
    near = tree / "tests" / mutant.path.parent.name
    stages = [["tests", "-m", "not slow"], ["tests", "-m", "slow"]]
    if near.is_dir():
        stages.insert(0, [str(near)])
    environment = os.environ | {"PYTHONPATH": str(tree)}
    try:
        for stage in stages:
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", str(workers), *stage]
            command += ["-p", "no:cacheprovider", "--ignore=tests/test_architecture.py"]
            run = subprocess.run(
                command,
                cwd=tree,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
            )
            if run.returncode != 0:
                lines = run.stdout.splitlines()
                failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
                return (failures or lines[-1:] or ["pytest did not run"])[0].split(" - ")[0]
    except subprocess.TimeoutExpired:
        return f"no end after {TIME_LIMIT} s"
    finally:
        write_source(target, mutant.text)
    return ""


def write_source(path: Path, text: str) -> None:
    """Write a module, and remove what was compiled of it, which may be as old and as long."""
    path.write_text(text)
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


def main() -> None:
    """Draw mutants, run the tests on each, and list the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    candidates = all_mutants()
    random.Random(arguments.seed).shuffle(candidates)
    drawn = [mutant for mutant in candidates if mutant.compiles()][: arguments.count]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "project"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
        for number, mutant in enumerate(drawn, start=1):
            failure = first_failure(mutant, tree, arguments.workers)
            end = f"killed by {failure}" if failure else "SURVIVED"
            print(f"{number:3} {mutant}\n    {end}", flush=True)
            if not failure:
                survivors.append(mutant)
    print(f"{len(drawn) - len(survivors)} of {len(drawn)} killed", *survivors, sep="\n")


if __name__ == "__main__":
    main()
