"""What every family of `tasks.FAMILIES` keeps. A new row of the registry is tested by all of it."""

import inspect
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import combinations
from types import ModuleType

import numpy as np
import pytest
import torch
import train
from command_line import default_options
from episode_checks import assert_class_major, assert_no_input_twice, is_same
from image_files import class_folders, write_tree
from scripts.running import draw_nothing
from tasksets import TinyOmniglot, import_learn2learn

import tasks
from tasks.sinusoid import Sinusoid

SPLITS = ("train", "validation", "test")
NUMBERS = {"ways": 3, "shots": 2, "queries": 4}


def folder_options(request):
    tmp_path = request.getfixturevalue("tmp_path")
    write_tree(tmp_path, class_folders(25, count=8))
    return {"data_root": tmp_path, "size": 8}


def dataset_options(request):
    values = np.random.default_rng(0).normal(size=(200, 7))
    return {"dataset": (values, np.arange(200) % 25)}


def published_options(request):
    """Each of train, val and test has a third of the classes."""
    tmp_path = request.getfixturevalue("tmp_path")
    files = {
        f"{('train', 'val', 'test')[int(path[1:3]) % 3]}/{path}": data
        for path, data in class_folders(15, count=8).items()
    }
    write_tree(tmp_path, files)
    return {"data_root": tmp_path, "size": 8}


def learn2learn_options(request):
    import_learn2learn()
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr("learn2learn.vision.datasets.full_omniglot.Omniglot", TinyOmniglot)
    return {"data_root": request.getfixturevalue("tmp_path"), "shots": 1, "queries": 1}


def omniglot_options(request):
    return {"data_root": request.getfixturevalue("real_omniglot")}


# Families that read data, and what `tasks.load` is given for them.
DATA = {
    "cifar-fs": published_options,
    "dataset": dataset_options,
    "fc100": published_options,
    "folder": folder_options,
    "learn2learn": learn2learn_options,
    "mini-imagenet": published_options,
    "omniglot": omniglot_options,
}
SLOW = ("glyphs", "learn2learn", "omniglot")
EVERY_FAMILY = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in tasks.FAMILIES
]


@pytest.fixture(params=EVERY_FAMILY)
def load(request):
    """Load the splits of a family. Different calls give different objects."""
    numbers = dict(NUMBERS)
    if request.param in DATA:
        numbers |= DATA[request.param](request)
    return partial(tasks.load, request.param, **numbers)


def test_every_family_gives_balanced_disjoint_episodes_of_its_shapes(load):
    splits = load()
    for split in SPLITS:
        family = getattr(splits, split)
        episodes = family.sample(10, np.random.default_rng(0))
        assert family.name.endswith(f"/{split}")
        assert len(episodes) == 10
        for inputs, targets in (episodes.support, episodes.query):
            assert inputs.dtype == torch.float32
            assert inputs.shape == (10, targets.shape[1], *family.input_shape)
            if family.kind == "regression":
                assert targets.dtype == torch.float32
                assert targets.shape[2:] == (family.outputs,)
            else:
                assert family.kind == "classification"
                count = targets.shape[1] // family.outputs
                assert_class_major(targets, family.outputs, count)
        assert_no_input_twice(episodes)
        for label in episodes.labels.values():
            assert len(label) == 10


def test_the_kind_of_a_family_is_known_before_it_is_loaded(load):
    family = load().train
    (name,) = load.args
    assert tasks.family_kind(name) == family.kind, (
        f"{tasks.FAMILIES[name]}: got families of kind {family.kind!r}, expected "
        f"{tasks.family_kind(name)!r}; set KIND = {family.kind!r} in that module, by which the "
        "command line chooses its defaults"
    )


def test_no_class_of_a_family_is_in_two_splits(load):
    splits = load()
    for one, other in combinations(SPLITS, 2):
        first = getattr(splits, one)
        second = getattr(splits, other)
        assert first.name != second.name
        assert not set(getattr(first, "classes", ())) & set(getattr(second, "classes", ()))
        drawn = [tasks.EpisodeSampler(family, tasks=2)[0] for family in (first, second)]
        assert not torch.equal(drawn[0].support[0], drawn[1].support[0])


def test_a_batch_of_a_family_depends_on_split_seed_and_number_alone(load):
    splits = load()
    again = load()
    assert splits.digests == again.digests
    for split in SPLITS:
        sampler = tasks.EpisodeSampler(getattr(splits, split), tasks=2, seed=5)
        batches = {i: sampler[i] for i in (0, 3, 1000)}
        torch.manual_seed(1)
        np.random.seed(1)
        other = tasks.EpisodeSampler(getattr(again, split), tasks=2, seed=5)
        for i in (1000, 0, 3):
            assert is_same(other[i], batches[i])
        assert not is_same(batches[0], batches[3])


# The registry


@pytest.mark.parametrize("name", tasks.FAMILIES)
def test_a_family_is_a_module_with_a_documented_load(name):
    module = import_module(tasks.FAMILIES[name])
    assert tasks.family_summaries()[name] == module.__doc__.splitlines()[0]
    assert module.__doc__.splitlines()[0].endswith(".")
    assert "Args:" in module.load.__doc__
    parameters = inspect.signature(module.load).parameters
    assert {"ways", "shots", "queries"} <= set(parameters)
    for option, parameter in parameters.items():
        assert parameter.kind == inspect.Parameter.KEYWORD_ONLY
        assert f"{option}:" in module.load.__doc__
        if option not in ("ways", "shots", "queries"):
            assert parameter.default is not inspect.Parameter.empty


def test_an_unknown_family_or_option_lists_the_known(tmp_path):
    known = ", ".join(tasks.FAMILIES)
    with pytest.raises(ValueError, match=f"task: got 'mnist', expected one of {known}"):
        tasks.load("mnist")
    message = "omniglot: got option rotation, expected data_root, rotations, split"
    with pytest.raises(ValueError, match=message):
        tasks.load("omniglot", rotation=True)
    with pytest.raises(ValueError, match="sinusoid: got option data_root, expected none"):
        tasks.load("sinusoid", data_root=tmp_path)


def load_cosines(*, ways, shots, queries, shift=0.0):
    families = [Sinusoid(shots=shots, queries=queries, split=split) for split in SPLITS]
    return tasks.Splits(*families)


@pytest.fixture
def new_family(monkeypatch):
    """A family that is one module and one row of the registry."""
    module = ModuleType("cosines", "Waves that are shifted.\n\nMore of them.")
    module.load = load_cosines
    module.KIND = "regression"
    monkeypatch.setitem(sys.modules, "cosines", module)
    monkeypatch.setitem(tasks.FAMILIES, "cosines", "cosines")
    return "cosines"


def test_the_command_line_lists_every_family_and_a_new_one(new_family, capsys):
    with pytest.raises(SystemExit) as finished:
        train.parse(["--help"])
    assert finished.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "- cosines: Waves that are shifted." in text
    for name, summary in tasks.family_summaries().items():
        assert f"- {name}: {summary}" in text


@pytest.mark.parametrize("method", [None, "cg", "first-order"])
def test_a_new_family_of_regression_has_the_defaults_of_sinusoid(new_family, method):
    expected = replace(default_options("sinusoid", method), task=new_family)
    assert default_options(new_family, method) == expected


@pytest.mark.slow
def test_the_command_line_trains_on_a_new_family(new_family, tmp_path, monkeypatch, capsys):
    draw_nothing(monkeypatch)
    options = ["--task", new_family, "--task-options", "shift=0.5"]
    limits = ["--steps=1", "--test-episodes=2", "--validation-episodes=2", "--meta-batch=2"]
    train.main([*options, *limits, "--out", str(tmp_path / "run")])
    assert "cosines, unrolled: test" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").exists()
