"""Tasks of tasksets that learn2learn itself makes."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from episode_checks import is_same
from tasksets import (
    CLASSES,
    SAMPLES,
    Codes,
    TinyOmniglot,
    assert_codes,
    classes_of_ways,
    draw,
    global_states,
    import_learn2learn,
    make_family,
)
from torch.utils.data import Dataset

from tasks.episodes import EpisodeSampler, Splits
from tasks.learn2learn import LearnToLearn, load

pytestmark = pytest.mark.learn2learn


@pytest.fixture
def l2l() -> Any:
    return import_learn2learn()


def make_taskset(
    l2l: Any, data: Dataset[Any] | None = None, num_tasks: int = -1, *, remap: bool = True
) -> Any:
    dataset = l2l.data.MetaDataset(Codes() if data is None else data)
    names = [("NWays", {"n": 4}), ("KShots", {"k": 5}), ("LoadData", {})]
    names += [("RemapLabels", {}), ("ConsecutiveLabels", {})] if remap else []
    transforms = [getattr(l2l.data.transforms, name)(dataset, **options) for name, options in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it prefers the newer name, Taskset
        return l2l.data.TaskDataset(dataset, transforms, num_tasks=num_tasks)


@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("num_tasks", [-1, 7])
def test_a_task_dataset_is_cut_labelled_and_drawn_by_the_generator_alone(
    l2l: Any, num_tasks: int, remap: bool
) -> None:
    family = make_family(make_taskset(l2l, num_tasks=num_tasks, remap=remap))
    before = global_states()
    episodes = draw(family, seed=1)
    assert global_states() == before
    assert_codes(episodes, ways=4, shots=2, queries=3)
    assert torch.equal(episodes.labels["classes"], classes_of_ways(episodes))
    random.seed(7)
    again = make_family(make_taskset(l2l, num_tasks=num_tasks, remap=remap))
    assert is_same(episodes, draw(again, seed=1))
    assert not is_same(episodes, draw(family, seed=2))


def test_random_data_transforms_follow_the_generator(l2l: Any) -> None:
    noisy = Codes(lambda x: x + torch.rand(2) + np.random.rand() + random.random())
    family = make_family(make_taskset(l2l, noisy))
    assert is_same(draw(family), draw(family))
    assert not is_same(draw(family), draw(family, seed=1))


def test_text_labels_are_numbered_by_their_position_in_the_dataset(l2l: Any) -> None:
    text = Codes(label=lambda c: f"class {c}")
    episodes = draw(make_family(make_taskset(l2l, text, remap=False)))
    assert_codes(episodes, ways=4, shots=2, queries=3)
    assert torch.equal(episodes.labels["classes"], classes_of_ways(episodes))


def test_classes_are_not_named_if_a_task_merges_several(l2l: Any) -> None:
    fine = {i: i // 4 for i in range(CLASSES * SAMPLES)}
    dataset = l2l.data.MetaDataset(Codes(), indices_to_labels=fine)
    ways = l2l.data.transforms.NWays(dataset, n=len(fine) // 4)
    load_data = l2l.data.transforms.LoadData(dataset)  # its labels are coarser
    taskset = l2l.data.Taskset(dataset, [ways, load_data])
    assert draw(make_family(taskset, ways=CLASSES)).labels == {}


def filtered_family(l2l: Any, labels: list[int], source: Any) -> LearnToLearn:
    """The family of some classes of a `MetaDataset`."""
    part = l2l.data.FilteredMetaDataset(source, labels)
    named = l2l.data.transforms
    transforms = [
        named.FusedNWaysKShots(part, n=4, k=5),
        named.LoadData(part),
        named.RemapLabels(part),
    ]
    return make_family(l2l.data.Taskset(part, transforms))


def test_splits_that_share_a_class_are_refused(l2l: Any) -> None:
    whole = l2l.data.MetaDataset(Codes())
    train = filtered_family(l2l, [0, 1, 2, 3], whole)
    overlapping = filtered_family(l2l, [3, 4, 5, 6], whole)
    test = filtered_family(l2l, [8, 9, 10, 11], whole)
    assert len(train.classes) == 4
    assert train.class_names == ("0", "1", "2", "3")
    with pytest.raises(ValueError, match=r"share 1 classes, such as 'Codes-.*/3'"):
        Splits(train, overlapping, test)


def test_digests_do_not_depend_on_the_dataset_object(l2l: Any) -> None:
    """Another process has another object of the same classes."""
    digests = []
    for _ in range(2):
        whole = l2l.data.MetaDataset(Codes())
        parts = ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])
        splits = Splits(*(filtered_family(l2l, labels, whole) for labels in parts))
        digests.append(splits.digests)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_draw_the_stream(l2l: Any, workers: int) -> None:
    family = make_family(make_taskset(l2l, num_tasks=5))
    sampler = EpisodeSampler(family, tasks=3, seed=2)
    batches = list(sampler.batches(4, workers=workers))
    assert all(is_same(batch, sampler[i]) for i, batch in enumerate(batches))


@pytest.mark.slow
def test_the_omniglot_benchmark_keeps_its_splits_apart(
    l2l: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("learn2learn.vision.datasets.full_omniglot.Omniglot", TinyOmniglot)
    before = global_states()
    splits = load(ways=5, shots=1, queries=1, data_root=tmp_path / "data")
    again = load(ways=5, shots=1, queries=1, data_root=tmp_path / "data")
    assert global_states() == before

    drawn: set[int] = set()
    for name, characters in {"train": 1100, "validation": 100, "test": 423}.items():
        family = getattr(splits, name)
        episodes = draw(family, tasks=40)
        assert len(family.classes) == characters
        assert family.input_shape == (1, 28, 28)
        assert episodes.support[0].shape == (40, 5, 1, 28, 28)
        assert is_same(episodes, draw(getattr(again, name), tasks=40)), "another division"
        classes = set(episodes.labels["classes"].flatten().tolist())
        assert not classes & drawn
        drawn |= classes


def test_an_unknown_benchmark_lists_the_known(l2l: Any) -> None:
    message = "taskset: got 'mnist', expected one of cifarfs, fc100, mini-imagenet, omniglot"
    with pytest.raises(ValueError, match=message):
        load(taskset="mnist")
