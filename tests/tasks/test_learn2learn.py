"""Tasks of a learn2learn taskset, on a stand-in that needs nothing installed."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from episode_checks import is_same
from tasksets import (
    SAMPLES,
    Codes,
    FakeBenchmark,
    FakeTaskset,
    assert_codes,
    classes_of_ways,
    draw,
    global_states,
    make_family,
)

from tasks.learn2learn import load


def test_episodes_are_class_major_and_support_and_query_disjoint() -> None:
    family = make_family(FakeTaskset())
    assert family.name == "learn2learn/train"
    assert family.kind == "classification"
    assert family.input_shape == (2,)
    assert family.outputs == 4
    assert_codes(draw(family), ways=4, shots=2, queries=3)


def test_samples_beyond_shots_and_queries_are_left_out() -> None:
    family = make_family(FakeTaskset(samples=8), shots=1, queries=2)
    assert_codes(draw(family), ways=4, shots=1, queries=2)


def test_labels_that_are_not_0_to_ways_are_numbered_in_random_order() -> None:
    classes = classes_of_ways(draw(make_family(FakeTaskset()), tasks=30))
    ranks = classes.argsort(1).argsort(1)
    assert len(ranks.unique(dim=0)) > 10, "the order of the ways follows the classes"


@pytest.mark.parametrize("num_tasks", [-1, 3])
def test_episodes_depend_on_the_generator_alone(num_tasks: int) -> None:
    family = make_family(FakeTaskset(num_tasks=num_tasks))
    random.seed(5)
    first = draw(family, seed=1)
    random.seed(6)
    draw(family, seed=2)
    assert is_same(first, draw(family, seed=1))
    assert is_same(first, draw(make_family(FakeTaskset(num_tasks=num_tasks)), seed=1))
    assert not is_same(first, draw(family, seed=2))


def test_a_finite_taskset_keeps_its_tasks_and_its_cached_descriptions() -> None:
    taskset = FakeTaskset(num_tasks=3)
    cached = FakeTaskset(samples=5).transform(None)
    taskset.sampled_descriptions[1] = cached
    episodes = draw(make_family(taskset), tasks=40)
    drawn = {tuple(sorted(classes)) for classes in classes_of_ways(episodes).tolist()}
    assert len(drawn) == 3
    assert tuple(sorted({part.index // SAMPLES for part in cached})) in drawn
    assert list(taskset.sampled_descriptions) == [1]


def test_global_generators_are_restored_even_after_an_error() -> None:
    before = global_states()
    taskset = FakeTaskset()
    family = make_family(taskset)
    draw(family)
    assert global_states() == before
    taskset.get_task = lambda description: torch.empty(0)[0]
    with pytest.raises(IndexError):
        draw(family)
    assert global_states() == before


def test_a_benchmark_gives_the_split_asked_for() -> None:
    assert make_family(FakeBenchmark(), ways=3, split="test").outputs == 3
    message = "split: got 'dev', expected one of train, validation, test"
    with pytest.raises(ValueError, match=message):
        make_family(FakeBenchmark(), split="dev")


@pytest.mark.parametrize(
    ("taskset", "numbers", "message"),
    [
        (
            FakeTaskset(),
            {"ways": 5},
            "ways: got 5, but the tasks of learn2learn/train have 4 classes; ask for ways=4",
        ),
        (FakeTaskset(), {"ways": 3}, "ways: got 3, but .* 4 classes.* n=3 ways"),
        (
            FakeTaskset(),
            {"shots": 3},
            r"shots \+ queries: got 3 \+ 3 = 6, but .* has 5 samples; ask for fewer .* k=6",
        ),
        (FakeTaskset(), {"queries": 0}, "queries: got 0, expected at least 1"),
        (
            FakeTaskset(samples=40, replacement=True),
            {},
            "taskset: .* holds a sample twice.*replacement=False",
        ),
    ],
)
def test_tasks_that_cannot_be_cut_as_asked_are_refused(
    taskset: FakeTaskset, numbers: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_family(taskset, **numbers)


def test_a_plain_dataset_is_refused() -> None:
    message = "taskset: got Codes without dataset, expected a learn2learn Taskset .* wrap"
    with pytest.raises(TypeError, match=message):
        make_family(Codes())


def test_without_learn2learn_the_error_names_the_extra_and_the_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    message = r"metaimplicit\[learn2learn\].*--no-build-isolation .*global-option=build_ext"
    with pytest.raises(ImportError, match=message):
        load()
