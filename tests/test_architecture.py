"""Imports go down a list of layers, are quick, and bring no warning."""

import ast
import gc
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import metaimplicit
import tasks

LAYERS = (
    (
        "params",
        "captured",
        "counts",
        "functional",
        "functions",
        "compiled",
        "buffers",
        "forward_mode",
        "optimizer_state",
        "options",
        "plain_state",
        "random_state",
        "recomputation",
        "scoped",
        "stance",
        "task_axis",
        "graph",
        "labels",
        "loss_state",
        "mended",
        "unchanged",
        "unsupported",
        "versions",
        "wrappers",
        "models",
        "normalization",
        "tensors",
    ),
    ("problem", "iterate"),
    ("data",),
    ("lifted",),
    ("operators",),
    ("solvers",),
    ("inner",),
    ("methods",),
    ("vectorization", "compilation", "outer", "features", "gradients"),
    ("hypergradient",),
    ("argmin",),
    ("diagnostics",),
    ("learner", "tuning", "optim", "root"),
    ("training",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ROOT = Path(metaimplicit.__file__).parent
OURS = sorted(
    path
    for name in ("metaimplicit", "tasks", "scripts")
    for path in (ROOT.parent / name).rglob("*.py")
)
TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.fixture(autouse=True, scope="module")
def _no_garbage() -> Iterator[None]:
    """All trees are kept, so that the garbage collector would look at them again and again."""
    gc.disable()
    yield
    gc.enable()


@cache
def parse(path):
    return ast.parse(path.read_text())


@cache
def nodes(path):
    return list(ast.walk(parse(path)))


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def definitions(path):
    """The names of the functions, classes, variables and attributes that a module makes."""
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def used_names(path):
    """The names that a module reads, as variables, attributes, imports or strings."""
    for node in nodes(path):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def imports_at_load(path):
    """The modules that a module imports when it is imported, with `from package import module`."""
    for node in parse(path).body:
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports(path):
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def sources(package):
    return sorted(Path(package.__file__).parent.rglob("*.py"))


def test_imports_only_go_down():
    checked = 0
    for path in sources(metaimplicit):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imports(path):
            if name.startswith("metaimplicit."):
                other = name.split(".")[1]
                assert (
                    other == own or LEVEL[other] < LEVEL[own] or LEVEL[other] == LEVEL[own] == 0
                ), f"{path}: {name}"
                checked += 1
    assert checked > 50


def test_no_module_imports_itself_through_others():
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in OURS}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    graph = {
        name: {module for module in imports_at_load(path) if module in modules} - {name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, " → ".join((*above, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_private_attribute_is_read_in_another_module():
    own = {path: set(definitions(path)) for path in OURS}
    everywhere = set().union(*own.values())
    for path in OURS:
        for node in nodes(path):
            if not isinstance(node, ast.Attribute) or not is_private(node.attr):
                continue
            if hasattr(torch.Tensor, node.attr):
                continue
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                continue  # a subclass may use what its base class keeps for its subclasses
            foreign = node.attr in everywhere and node.attr not in own[path]
            assert not foreign, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_private_name_is_imported():
    for path in OURS:
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom):
                private = [alias.name for alias in node.names if is_private(alias.name)]
                assert not private, f"{path}:{node.lineno}: {private}"


def test_every_name_that_is_defined_is_used():
    defined = {path: set(definitions(path)) for path in OURS}
    unused = set().union(*defined.values()).difference(*map(used_names, OURS))
    unused = {name for name in unused if not name.startswith("__")}
    for path in TESTS:
        text = path.read_text()
        if any(name in text for name in unused):
            unused.difference_update(used_names(path))
    # by higher's optimisers, by pickle, by warnings, and by torch.autograd.Function
    called_by_libraries = {"_update", "find_class", "formatwarning"}
    called_by_libraries |= {"setup_context", "generate_vmap_rule"}
    for path in OURS:
        dead = defined[path] & unused
        assert dead <= called_by_libraries, f"{path}: {dead}"


def test_the_packages_do_not_know_each_other():
    for package, other in ((metaimplicit, "tasks"), (tasks, "metaimplicit")):
        assert not [
            p
            for p in sources(package)
            for name in imports(p)
            if name.split(".")[0] in (other, "scripts")
        ]


def test_one_module_imports_higher():
    importers = [
        p.name
        for p in sources(metaimplicit)
        if any(n.split(".")[0] == "higher" for n in imports(p))
    ]
    assert importers == ["differentiable.py"]


def test_import_is_light_and_silent():
    heavy = ("matplotlib", "optuna", "scipy", "sklearn", "sympy", "torch._dynamo", "torchvision")
    heavy += ("PIL", "learn2learn")
    code = (
        "import sys, torch.utils.checkpoint; "  # which imports sympy in older versions
        "before = set(sys.modules); import tasks; "
        "assert 'metaimplicit' not in sys.modules; import metaimplicit; "
        f"print(sorted(set({heavy}) & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_every_public_name_is_there_and_documented():
    for name in metaimplicit.__all__:
        assert getattr(metaimplicit, name).__doc__, name
