"""Arguments may be given by the names that documentation and errors use."""

import importlib
import inspect
import pkgutil

import metaimplicit


def functions_of(module):
    """The functions of a module and the methods of its classes, by their names."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value).items() if inspect.isclass(value) else [("", value)]
        for member, function in members:
            if member.startswith("__annotate"):  # Python's own
                continue
            for inner in ("__func__", "fget"):  # of a class or static method, of a property
                function = getattr(function, inner, function)
            function = inspect.unwrap(function)  # of a cache
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                yield f"{module.__name__}.{name}.{member}", function


def test_no_argument_is_positional_only():
    seen = 0
    for module in pkgutil.walk_packages(metaimplicit.__path__, "metaimplicit."):
        for name, function in functions_of(importlib.import_module(module.name)):
            seen += 1
            kinds = [p.kind for p in inspect.signature(function).parameters.values()]
            assert inspect.Parameter.POSITIONAL_ONLY not in kinds, name
    assert seen > 1000
