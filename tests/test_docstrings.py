"""The examples in docstrings run, and every public class and function has one."""

import doctest
import importlib
import inspect
import os
import pkgutil
import sys
from types import GenericAlias
from unittest import mock

import pytest

import metaimplicit
import tasks

PACKAGES = (metaimplicit, tasks)
MODULES = [
    name
    for package in PACKAGES
    for name in (
        package.__name__,
        *(m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")),
    )
]


def module_of(name):
    importlib.import_module(name)
    return sys.modules[name]  # a function may hide the module of its name in the package


@pytest.mark.parametrize("name", MODULES)
@mock.patch.dict(os.environ)  # examples may change it
def test_the_examples_of_a_module_run(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module_of(name)):
        if not test.examples:
            continue
        report = []
        runner.run(test, out=report.append)
        assert runner.failures == 0, "".join(report)


def public_objects():
    """The classes and functions in the `__all__` of every package, by name."""
    for name in MODULES:
        module = module_of(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            is_alias = isinstance(value, GenericAlias)  # which Python 3.10 takes for a class
            if (inspect.isclass(value) and not is_alias) or inspect.isfunction(value):
                yield f"{name}.{public}", value


def test_every_public_class_and_function_has_an_example():
    lacking = [name for name, value in public_objects() if ">>>" not in (value.__doc__ or "")]
    assert not lacking
