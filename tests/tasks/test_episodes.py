"""N-way K-shot tasks, splits of their classes, and the stream of episodes."""

from itertools import islice

import numpy as np
import pytest
import torch
from episode_checks import assert_class_major, assert_no_input_twice, is_same

from tasks import EpisodeSampler, FewShot, ImagePool, Splits, load
from tasks.few_shot import few_shot_splits, shuffled_split

COUNTS = (6, 8, 7, 6, 9, 6, 7)


def numbered_pool(counts=COUNTS):
    """A pool whose image number i has every pixel i, so that pixels identify images."""
    numbers = torch.arange(sum(counts), dtype=torch.uint8)
    images = numbers[:, None, None, None].repeat(1, 1, 2, 3)
    return ImagePool.from_sorted(images, counts, [f"class {c}" for c in range(len(counts))])


def few_shot(pool=None, ways=4, shots=2, queries=3, name="test/train"):
    pool = numbered_pool() if pool is None else pool
    return FewShot(pool, ways=ways, shots=shots, queries=queries, name=name)


def image_numbers(inputs):
    return (inputs[..., 0, 0, 0] * 255).round().long()


def first_batches(sampler, count):
    return list(islice(sampler, count))


def test_episodes_have_the_documented_shapes_and_types():
    family = few_shot()
    episodes = family.sample(5, np.random.default_rng(0))
    assert len(episodes) == 5
    assert episodes.support[0].shape == (5, 8, 1, 2, 3)
    assert episodes.query[0].shape == (5, 12, 1, 2, 3)
    assert episodes.support[0].dtype == episodes.query[0].dtype == torch.float32
    assert_class_major(episodes.support[1], ways=4, count=2)
    assert_class_major(episodes.query[1], ways=4, count=3)
    assert episodes.labels["classes"].dtype == torch.int64
    assert family.kind == "classification"
    assert family.input_shape == (1, 2, 3)
    assert family.outputs == 4


@pytest.mark.parametrize("seed", range(20))
def test_tasks_of_any_numbers_are_balanced_labelled_and_disjoint(seed):
    """Random pools, ways, shots and queries, up to what the pool allows."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 12, size=rng.integers(1, 20))
    shots = int(rng.integers(1, counts.min()))
    queries = int(rng.integers(1, counts.min() - shots + 1))
    ways = int(rng.integers(1, len(counts) + 1))
    pool = numbered_pool(counts)
    family = few_shot(pool, ways=ways, shots=shots, queries=queries)
    episodes = family.sample(8, rng)

    class_of_image = torch.arange(len(counts)).repeat_interleave(torch.from_numpy(counts))
    classes = episodes.labels["classes"]
    for (inputs, targets), count in ((episodes.support, shots), (episodes.query, queries)):
        assert_class_major(targets, ways, count)
        labelled = classes.gather(1, targets)
        assert torch.equal(class_of_image[image_numbers(inputs)], labelled)
    assert_no_input_twice(episodes)
    assert all(len(set(row)) == ways for row in classes.tolist())


def test_every_class_image_and_way_is_drawn_evenly():
    pool = numbered_pool((6,) * 7)
    episodes = few_shot(pool).sample(3000, np.random.default_rng(0))
    # Of 3000 tasks with 4 ways, each (class, way) has 3000/7 = 428.6, standard deviation 19.
    classes = episodes.labels["classes"]
    table = torch.stack([torch.bincount(way, minlength=7) for way in classes.T])
    assert (table - 3000 / 7).abs().max() < 4.5 * 19
    images = torch.bincount(image_numbers(episodes.support[0]).flatten(), minlength=42)
    assert (images - 3000 * 8 / 42).abs().max() < 4.5 * (3000 * 8 / 42) ** 0.5


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"ways": 0}, "ways: got 0, expected at least 1"),
        ({"shots": 0}, "shots: got 0, expected at least 1"),
        ({"shots": 1.5}, "shots: got 1.5, expected a whole number"),
        ({"ways": "2"}, "ways: got '2', expected a whole number"),
        ({"queries": -1}, "queries: got -1, expected at least 1"),
        ({"ways": 8}, "ways: got 8, but test/train has 7 classes"),
        (
            {"shots": 4},
            r"shots \+ queries: got 4 \+ 3 = 7, "
            r"but class 'class 0' of test/train has 6 images",
        ),
    ],
)
def test_numbers_that_the_data_cannot_serve_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        few_shot(**numbers)


# Splits of the classes


@pytest.mark.parametrize("seed", range(20))
def test_a_shuffled_split_has_every_class_once_and_depends_on_its_seed_alone(seed):
    classes = int(np.random.default_rng(seed).integers(25, 200))
    split = shuffled_split(classes, seed)
    assert sorted(np.concatenate(split)) == list(range(classes))
    for part, share in zip(split, (0.64, 0.16, 0.20), strict=True):
        assert abs(len(part) - share * classes) <= 1
    np.random.seed(seed)
    again = shuffled_split(classes, seed)
    assert all(np.array_equal(x, y) for x, y in zip(split, again, strict=True))
    other = shuffled_split(classes, seed + 1)
    assert not np.array_equal(split[0], other[0])

    pool = numbered_pool([1] * classes)
    pool = ImagePool.from_sorted(pool.images.repeat_interleave(2, 0), [2] * classes, pool.names)
    splits = few_shot_splits("test", pool, split, ways=1, shots=1, queries=1)
    names = [*splits.train.classes, *splits.validation.classes, *splits.test.classes]
    assert len(set(names)) == len(names) == classes


def test_a_sampler_takes_integers_of_numpy():
    family = few_shot(numbered_pool((6,) * 7))
    sampler = EpisodeSampler(family, tasks=np.int64(2), seed=np.int64(5))
    plain = EpisodeSampler(family, tasks=2, seed=5)
    assert [type(value) for value in sampler.state_dict().values()] == [str, int, int, int]
    for batch, expected in zip(sampler.batches(2), plain.batches(2), strict=True):
        assert torch.equal(batch.query[0], expected.query[0])


def test_a_shuffle_by_a_negative_seed_is_refused():
    for seed in (-1, 0.5):
        with pytest.raises(ValueError, match=f"seed: got {seed}, expected an integer ≥ 0"):
            shuffled_split(10, seed=seed)


def test_splits_that_share_a_class_are_refused():
    whole = numbered_pool()
    families = [
        few_shot(whole.subset(classes), ways=2, name=f"test/{i}")
        for i, classes in enumerate(([0, 1], [2, 3], [4, 0]))
    ]
    message = "test/0 and test/2 share 1 classes, such as 'class 0'"
    with pytest.raises(ValueError, match=message):
        Splits(*families)


# The stream


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_depends_on_family_seed_and_number_alone(seed):
    rng = np.random.default_rng(seed)
    indices = rng.choice(10_000, 6, replace=False).tolist()
    expected = [EpisodeSampler(few_shot(), tasks=3, seed=seed)[i] for i in indices]

    sampler = EpisodeSampler(few_shot(), tasks=3, seed=seed)
    first_batches(sampler, 3)  # moves the position
    torch.manual_seed(seed)
    np.random.seed(seed)
    for k in rng.permutation(6):
        assert is_same(sampler[indices[k]], expected[k])
    for other in (
        EpisodeSampler(few_shot(), tasks=3, seed=seed + 1),
        EpisodeSampler(few_shot(name="test/test"), tasks=3, seed=seed),
    ):
        assert not is_same(other[indices[0]], expected[0])
    assert not any(is_same(expected[i], expected[j]) for i in range(6) for j in range(i))


def test_a_resumed_stream_continues_to_the_same_bits():
    whole = first_batches(EpisodeSampler(few_shot(), tasks=3, seed=7), 6)
    stopped = EpisodeSampler(few_shot(), tasks=3, seed=7)
    start = first_batches(stopped, 2)
    resumed = EpisodeSampler(few_shot(), tasks=3, seed=7)
    resumed.load_state_dict(stopped.state_dict())
    end = first_batches(resumed, 4)
    assert all(is_same(x, y) for x, y in zip(whole, start + end, strict=True))


# Python 3.12 and later warn of a fork of any process that has threads.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_draws_the_stream_and_leaves_the_global_generator_alone(workers):
    expected = first_batches(EpisodeSampler(few_shot(), tasks=3), 7)
    sampler = EpisodeSampler(few_shot(), tasks=3)
    state = torch.get_rng_state()
    loaded = list(sampler.batches(4, workers=workers))
    assert sampler.position == 4
    loaded += list(sampler.batches(3, workers=workers))
    assert all(is_same(x, y) for x, y in zip(expected, loaded, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_position_is_that_of_the_last_batch_though_two_streams_are_read():
    sampler = EpisodeSampler(few_shot(), tasks=2, seed=3)
    first, second = sampler.batches(3), sampler.batches(3)
    for stream in (first, second, first):
        batch = next(stream)
    assert torch.equal(batch.support[0], sampler[1].support[0])
    assert sampler.position == 2


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"count": -1}, "count: got -1"),
        ({"count": 2.0}, "count: got 2.0"),
        ({"count": 2, "workers": -1}, "workers: got -1"),
        ({"count": 2, "workers": 0.5}, "workers: got 0.5"),
    ],
)
def test_numbers_of_batches_and_workers_are_whole(numbers, message):
    with pytest.raises(ValueError, match=f"{message}, expected a whole number ≥ 0"):
        next(EpisodeSampler(few_shot(), tasks=3).batches(**numbers))


def test_a_state_taken_between_two_loaded_batches_resumes_at_the_second():
    sampler = EpisodeSampler(few_shot(), tasks=3)
    batches = sampler.batches(5)
    next(batches)
    resumed = EpisodeSampler(few_shot(), tasks=3)
    resumed.load_state_dict(sampler.state_dict())
    assert is_same(next(batches), next(iter(resumed)))


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("tasks", 4), ("family", "other/train")])
def test_the_state_of_another_stream_is_refused(key, value):
    sampler = EpisodeSampler(few_shot(), tasks=3)
    state = sampler.state_dict()
    with pytest.raises(ValueError, match=f"sampler state: got {key}={value!r}, expected"):
        sampler.load_state_dict(state | {key: value})
    del state[key]
    with pytest.raises(ValueError, match=f"sampler state: got {key}=None"):
        sampler.load_state_dict(state)


def test_a_state_without_a_position_is_refused():
    sampler = EpisodeSampler(few_shot(), tasks=3)
    state = sampler.state_dict()
    del state["position"]
    with pytest.raises(ValueError, match="got family, tasks, seed, expected a position as well"):
        sampler.load_state_dict(state)


def test_a_sampler_refuses_no_tasks_and_a_negative_seed():
    with pytest.raises(ValueError, match="tasks: got 0, expected at least 1"):
        EpisodeSampler(few_shot(), tasks=0)
    with pytest.raises(ValueError, match=r"tasks: got 2\.0, expected at least 1"):
        EpisodeSampler(few_shot(), tasks=2.0)
    with pytest.raises(ValueError, match="family: got Splits, expected a family of tasks"):
        EpisodeSampler(load("sinusoid"), tasks=2)
    with pytest.raises(ValueError, match="seed: got -1"):
        EpisodeSampler(few_shot(), tasks=1, seed=-1)


def test_a_stream_has_no_batch_before_its_first():
    sampler = EpisodeSampler(load("sinusoid").train, tasks=2, seed=0)
    with pytest.raises(ValueError, match="index: got -1, expected a batch number ≥ 0"):
        sampler[-1]
    for index in (2.5, slice(2)):
        with pytest.raises(ValueError, match=r"index: got .*expected a batch number ≥ 0"):
            sampler[index]


def test_moved_episodes_keep_their_labels_where_they_are():
    episodes = few_shot().sample(2, np.random.default_rng(0))
    moved = episodes.to("meta")
    for x in (*moved.support, *moved.query):
        assert x.device.type == "meta"
    assert moved.labels is episodes.labels


def test_a_family_gives_tasks_of_other_sizes_from_the_same_classes():
    family = few_shot(ways=2, shots=1)
    larger = family.with_sizes(ways=5, shots=3)
    assert (larger.ways, larger.shots, larger.queries) == (5, 3, family.queries)
    assert larger.pool is family.pool
    with pytest.raises(ValueError, match="ways: got 8, but test/train has 7 classes"):
        family.with_sizes(ways=8, shots=1)
