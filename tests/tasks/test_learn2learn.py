"""Learn2learn's tasksets as episodes: on a stand-in that needs nothing installed, and on the real thing."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks.episodes import Episodes, EpisodeSampler, Splits
from tasks.learn2learn import LearnToLearn, load

CLASSES, EACH = 12, 9


class Codes(Dataset[tuple[Tensor, Any]]):
    """Sample i of a class, as the input [class, i]: an episode can be read back from its inputs."""

    def __init__(
        self, transform: Callable[[Tensor], Tensor] = lambda x: x, label: Callable[[int], Any] = int
    ) -> None:
        self.transform, self.label = transform, label

    def __len__(self) -> int:
        return CLASSES * EACH

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        code = torch.tensor(divmod(int(index), EACH), dtype=torch.float64)
        return self.transform(code), self.label(int(index) // EACH)


@dataclass
class Part:
    index: int


class FakeTaskset:
    """What the wrapper asks of a learn2learn taskset; its one transform draws from Python's global generator."""

    def __init__(
        self, ways: int = 4, each: int = 5, num_tasks: int = -1, replacement: bool = False
    ) -> None:
        self.dataset, self.num_tasks = Codes(), num_tasks
        self.sampled_descriptions: dict[int, list[Part]] = {}
        self.ways, self.each, self.draw = (
            ways,
            each,
            random.choices if replacement else random.sample,
        )
        self.task_transforms = [self.transform]

    def transform(self, description: None) -> list[Part]:
        chosen = random.sample(range(CLASSES), k=self.ways)
        return [Part(c * EACH + i) for c in chosen for i in self.draw(range(EACH), k=self.each)]

    def get_task(self, description: list[Part]) -> tuple[Tensor, Tensor]:
        inputs, labels = zip(*(self.dataset[part.index] for part in description), strict=True)
        return torch.stack(inputs), torch.tensor(labels)


@dataclass
class Benchmark:
    train: FakeTaskset = field(default_factory=FakeTaskset)
    validation: FakeTaskset = field(default_factory=FakeTaskset)
    test: FakeTaskset = field(default_factory=lambda: FakeTaskset(ways=3))


def family(
    taskset: Any, ways: int = 4, shots: int = 2, queries: int = 3, split: str = "train"
) -> LearnToLearn:
    return LearnToLearn(taskset, ways=ways, shots=shots, queries=queries, split=split)


def draw(source: LearnToLearn, seed: int = 0, tasks: int = 6) -> Episodes:
    return source.sample(tasks, np.random.default_rng(seed))


def tensors(episodes: Episodes) -> tuple[Tensor, ...]:
    return (*episodes.support, *episodes.query, *episodes.labels.values())


def same(one: Episodes, other: Episodes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def globals_now() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), *rest, torch.get_rng_state().tolist()


def check_codes(episodes: Episodes, ways: int, shots: int, queries: int) -> None:
    """Each way one class, the classes of a task distinct, no sample twice, labels the way's."""
    for each, (inputs, targets) in ((shots, episodes.support), (queries, episodes.query)):
        assert inputs.shape == (len(episodes), ways * each, 2)
        assert targets.dtype == torch.int64
        assert torch.equal(
            targets, torch.arange(ways).repeat_interleave(each).expand(len(episodes), -1)
        )
    for support, query in zip(episodes.support[0], episodes.query[0], strict=True):
        by_way = torch.cat(
            [support.unflatten(0, (ways, shots)), query.unflatten(0, (ways, queries))], 1
        )
        assert (by_way[:, :, 0] == by_way[:, :1, 0]).all()
        assert len(by_way[:, 0, 0].unique()) == ways
        assert len(by_way.flatten(0, 1).unique(dim=0)) == ways * (shots + queries)


# A stand-in taskset


def test_episodes_are_class_major_and_support_and_query_disjoint() -> None:
    source = family(FakeTaskset())
    assert (source.name, source.kind, source.input_shape, source.outputs) == (
        "learn2learn/train", "classification", (2,), 4
    )  # fmt: skip
    check_codes(draw(source), ways=4, shots=2, queries=3)


def test_samples_beyond_shots_and_queries_are_left_out() -> None:
    check_codes(draw(family(FakeTaskset(each=8), shots=1, queries=2)), ways=4, shots=1, queries=2)


def test_labels_that_are_not_ways_are_numbered_in_random_order() -> None:
    first = draw(family(FakeTaskset()), tasks=30).support[0][:, ::2, 0]
    rank = first.argsort(1).argsort(1)
    assert len(rank.unique(dim=0)) > 10, "the order of the ways follows the classes"


@pytest.mark.parametrize("num_tasks", [-1, 3])
def test_episodes_depend_on_the_generator_alone(num_tasks: int) -> None:
    source = family(FakeTaskset(num_tasks=num_tasks))
    random.seed(5)
    first = draw(source, seed=1)
    random.seed(6)
    draw(source, seed=2)
    assert same(first, draw(source, seed=1))
    assert same(first, draw(family(FakeTaskset(num_tasks=num_tasks)), seed=1))
    assert not same(first, draw(source, seed=2))


def test_a_finite_taskset_keeps_its_tasks_and_its_cache() -> None:
    taskset = FakeTaskset(num_tasks=3)
    taskset.sampled_descriptions[1] = cached = FakeTaskset(each=5).transform(None)
    episodes = draw(family(taskset), tasks=40)
    kinds = {tuple(sorted(task[:, 0].unique().tolist())) for task in episodes.support[0]}
    assert len(kinds) == 3
    assert tuple(sorted({part.index // EACH for part in cached})) in kinds
    assert list(taskset.sampled_descriptions) == [1]


def test_nothing_global_is_left_behind() -> None:
    before = globals_now()
    taskset = FakeTaskset()
    source = family(taskset)
    draw(source)
    assert globals_now() == before
    taskset.get_task = lambda description: torch.empty(0)[0]
    with pytest.raises(IndexError):
        draw(source)
    assert globals_now() == before


def test_a_benchmark_gives_the_split_asked_for() -> None:
    assert family(Benchmark(), ways=3, split="test").outputs == 3
    with pytest.raises(
        ValueError, match=r"split: got 'dev', expected one of train, validation, test"
    ):
        family(Benchmark(), split="dev")


@pytest.mark.parametrize(
    ("taskset", "numbers", "message"),
    [
        (
            FakeTaskset(),
            {"ways": 5},
            r"ways: got 5, but the tasks of learn2learn/train have 4 classes; ask for ways=4",
        ),
        (FakeTaskset(), {"ways": 3}, r"ways: got 3, but .* 4 classes.* n=3 ways"),
        (
            FakeTaskset(),
            {"shots": 3},
            r"shots \+ queries: got 3 \+ 3 = 6, but .* has 5 samples; ask for fewer .* k=6",
        ),
        (FakeTaskset(), {"queries": 0}, r"queries: got 0, expected at least 1"),
        (
            FakeTaskset(each=40, replacement=True),
            {},
            r"taskset: .* holds a sample twice.*replacement=False",
        ),
    ],
)
def test_numbers_that_do_not_fit(
    taskset: FakeTaskset, numbers: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        family(taskset, **numbers)


def test_a_plain_dataset_is_refused() -> None:
    with pytest.raises(
        TypeError,
        match=r"taskset: got Codes without dataset, expected a learn2learn Taskset .* wrap",
    ):
        family(Codes())


def test_without_learn2learn_the_error_names_extra_and_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    with pytest.raises(
        ImportError,
        match=r"metaimplicit\[learn2learn\].*--no-build-isolation .*global-option=build_ext",
    ):
        load()


# learn2learn itself


@pytest.fixture(name="l2l")
def _l2l() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "learn2learn", reason="needs the extra metaimplicit[learn2learn]"
        )


def real_taskset(
    l2l: Any, data: Dataset[Any] | None = None, num_tasks: int = -1, *, remap: bool = True
) -> Any:
    dataset = l2l.data.MetaDataset(Codes() if data is None else data)
    names = [("NWays", {"n": 4}), ("KShots", {"k": 5}), ("LoadData", {})]
    names += [("RemapLabels", {}), ("ConsecutiveLabels", {})] if remap else []
    transforms = [getattr(l2l.data.transforms, name)(dataset, **options) for name, options in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it prefers the newer name, Taskset
        return l2l.data.TaskDataset(dataset, transforms, num_tasks=num_tasks)


@pytest.mark.learn2learn
@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("num_tasks", [-1, 7])
def test_a_task_dataset(l2l: Any, num_tasks: int, remap: bool) -> None:
    source = family(real_taskset(l2l, num_tasks=num_tasks, remap=remap))
    before = globals_now()
    episodes = draw(source, seed=1)
    assert globals_now() == before
    check_codes(episodes, ways=4, shots=2, queries=3)
    assert torch.equal(episodes.labels["classes"], episodes.support[0][:, ::2, 0].long())
    random.seed(7)
    assert same(episodes, draw(family(real_taskset(l2l, num_tasks=num_tasks, remap=remap)), seed=1))
    assert not same(episodes, draw(source, seed=2))


@pytest.mark.learn2learn
def test_random_data_transforms_follow_the_generator(l2l: Any) -> None:
    noisy = Codes(lambda x: x + torch.rand(2) + np.random.rand() + random.random())
    source = family(real_taskset(l2l, noisy))
    assert same(draw(source), draw(source))
    assert not same(draw(source), draw(source, seed=1))


@pytest.mark.learn2learn
def test_text_labels_are_numbered_by_their_place_in_the_dataset(l2l: Any) -> None:
    source = family(real_taskset(l2l, Codes(label=lambda c: f"class {c}"), remap=False))
    episodes = draw(source)
    check_codes(episodes, ways=4, shots=2, queries=3)
    assert torch.equal(episodes.labels["classes"], episodes.support[0][:, ::2, 0].long())


@pytest.mark.learn2learn
def test_merged_classes_are_not_named(l2l: Any) -> None:
    dataset = l2l.data.MetaDataset(
        Codes(), indices_to_labels={i: i // 4 for i in range(CLASSES * EACH)}
    )
    named = l2l.data.transforms
    transforms = [
        named.NWays(dataset, n=CLASSES * EACH // 4),
        named.LoadData(dataset),
    ]  # labels loaded are coarser
    taskset = l2l.data.Taskset(dataset, transforms)
    assert draw(family(taskset, ways=CLASSES)).labels == {}


@pytest.mark.learn2learn
def test_splits_that_share_a_class_are_found(l2l: Any) -> None:
    whole = l2l.data.MetaDataset(Codes())

    def part(labels: list[int], source: Any = whole) -> LearnToLearn:
        only = l2l.data.FilteredMetaDataset(source, labels)
        named = l2l.data.transforms
        transforms = [
            named.FusedNWaysKShots(only, n=4, k=5),
            named.LoadData(only),
            named.RemapLabels(only),
        ]
        return family(l2l.data.Taskset(only, transforms))

    train, validation, test = part([0, 1, 2, 3]), part([4, 5, 6, 7]), part([8, 9, 10, 11])
    assert len(train.classes) == 4
    assert train.class_names == ("0", "1", "2", "3")
    again = l2l.data.MetaDataset(Codes())  # another object, as in another process
    alike = Splits(
        *(part(labels, again) for labels in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]))
    )
    assert alike.digests == Splits(train, validation, test).digests
    with pytest.raises(ValueError, match=r"share 1 classes, such as 'Codes-.*/3'"):
        Splits(train, part([3, 4, 5, 6]), test)


@pytest.mark.learn2learn
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing(l2l: Any, workers: int) -> None:
    sampler = EpisodeSampler(family(real_taskset(l2l, num_tasks=5)), tasks=3, seed=2)
    batches = list(sampler.batches(4, workers=workers))
    assert all(same(batch, sampler[i]) for i, batch in enumerate(batches))


class OmniglotShape(Dataset[tuple[Any, int]]):
    """Torchvision's Omniglot with two tiny images a character."""

    def __init__(
        self, root: str, background: bool, target_transform: Any = int, download: bool = False
    ) -> None:
        self._characters, self.target_transform = (
            range(964 if background else 659),
            target_transform,
        )

    def __len__(self) -> int:
        return 2 * len(self._characters)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        if index >= len(self):
            raise IndexError(index)
        return Image.new("L", (4, 4), color=index % 251), self.target_transform(index // 2)


@pytest.mark.learn2learn
def test_the_omniglot_benchmark_keeps_its_splits_apart(
    l2l: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr("learn2learn.vision.datasets.full_omniglot.Omniglot", OmniglotShape)
    before = globals_now()
    splits, again = (
        load(ways=5, shots=1, queries=1, data_root=tmp_path / "data") for _ in range(2)
    )
    assert globals_now() == before

    seen = []
    for family_, other in zip(
        (splits.train, splits.validation, splits.test),
        (again.train, again.validation, again.test),
        strict=True,
    ):
        episodes = draw(family_, tasks=40)
        assert family_.input_shape == (1, 28, 28)
        assert episodes.support[0].shape == (40, 5, 1, 28, 28)
        assert same(episodes, draw(other, tasks=40)), "a second load divides the classes otherwise"
        seen.append(set(episodes.labels["classes"].flatten().tolist()))
    assert [len(f.classes) for f in (splits.train, splits.validation, splits.test)] == [
        1100,
        100,
        423,
    ]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


@pytest.mark.learn2learn
def test_an_unknown_benchmark_lists_the_known(l2l: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"taskset: got 'mnist', expected one of cifarfs, fc100, mini-imagenet, omniglot",
    ):
        load(taskset="mnist")
