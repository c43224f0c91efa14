"""Measure how the code reads: line lengths, packed assignments, long functions and long files.

python .ci/code_metrics.py [PATH ...]        # by default metaimplicit, tasks and scripts
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

MAX_FUNCTION = 60  # lines
MAX_FILE = 300  # lines


def code_lines(source: str) -> list[str]:
    """The lines that hold code: no blank lines, comments, or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    docstrings = docstring_lines(ast.parse(source))
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.type != tokenize.ENDMARKER:
            numbers.update(range(token.start[0], token.end[0] + 1))
    lines = source.splitlines()
    return [lines[number - 1] for number in sorted(numbers - docstrings)]


def docstring_lines(tree: ast.AST) -> set[int]:
    """The numbers of the lines of every string that stands alone as a statement."""
    numbers: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            numbers.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return numbers


def packed_assignments(tree: ast.AST) -> int:
    """Assignments of several values to several names in one statement, without swaps."""
    count = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and len(target.elts) == len(node.value.elts):
            names = sorted(map(ast.unparse, target.elts))
            values = sorted(map(ast.unparse, node.value.elts))
            count += names != values
    return count


def long_functions(path: Path, tree: ast.AST) -> list[str]:
    """Functions above the limit, their docstrings not counted."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0]
        docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        length = (node.end_lineno or 0) - node.lineno + 1
        if docstring:
            length -= (first.end_lineno or 0) - first.lineno + 1
        if length > MAX_FUNCTION:
            found.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    return found


def main(paths: list[str]) -> None:
    """Print the measures of all files under `paths`."""
    roots = [Path(path) for path in paths or ["metaimplicit", "tasks", "scripts"]]
    files = sorted(
        file for root in roots for file in (root.rglob("*.py") if root.is_dir() else [root])
    )
    lengths: list[int] = []
    packed = 0
    functions: list[str] = []
    long_files: list[str] = []
    for file in files:
        source = file.read_text()
        tree = ast.parse(source)
        lengths += [len(line) for line in code_lines(source)]
        packed += packed_assignments(tree)
        functions += long_functions(file, tree)
        if source.count("\n") > MAX_FILE:
            long_files.append(f"{file}: {source.count(chr(10))} lines")

    print(f"files {len(files)}, code lines {len(lengths)}")
    print(f"mean {statistics.fmean(lengths):.2f}, 90th percentile {percentile(lengths, 90)}")
    print(f"packed assignments per 100 lines {100 * packed / len(lengths):.2f} ({packed})")
    print(f"functions longer than {MAX_FUNCTION} lines: {len(functions)}", *functions, sep="\n  ")
    print(f"files longer than {MAX_FILE} lines: {len(long_files)}", *long_files, sep="\n  ")


def percentile(values: list[int], share: int) -> int:
    """The value that `share` percent of `values` lie below."""
    return sorted(values)[len(values) * share // 100]


if __name__ == "__main__":
    main(sys.argv[1:])
