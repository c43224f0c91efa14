"""The stream of episodes, N-way K-shot sampling, splits and the registry."""

import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

import tasks
from tasks import EpisodeSampler, FewShot, ImagePool, Splits

COUNTS = (6, 8, 7, 6, 9, 6, 7)


def pool(counts=COUNTS):
    """Image number i of the pool has every pixel i, so pixels name images."""
    images = torch.arange(sum(counts), dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 2, 3)
    return ImagePool.from_sorted(images, counts, [f"class {c}" for c in range(len(counts))])


def few_shot(ways=4, shots=2, queries=3, name="test/train", of=None):
    return FewShot(of or pool(), ways=ways, shots=shots, queries=queries, name=name)


def image_numbers(inputs):
    return (inputs[..., 0, 0, 0] * 255).round().long()


def same(a, b):
    pairs = zip(
        (*a.support, *a.query, *a.labels.values()),
        (*b.support, *b.query, *b.labels.values()),
        strict=True,
    )
    return all(torch.equal(x, y) for x, y in pairs)


def test_episode_shapes_types_and_attributes():
    family = few_shot()
    episodes = family.sample(5, np.random.default_rng(0))
    (x, y), (qx, qy) = episodes.support, episodes.query
    assert (x.shape, qx.shape, len(episodes)) == ((5, 8, 1, 2, 3), (5, 12, 1, 2, 3), 5)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 5
    assert qy.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] * 5
    assert (family.kind, family.input_shape, family.outputs) == ("classification", (1, 2, 3), 4)


def test_labels_name_the_class_of_every_image():
    episodes = few_shot().sample(50, np.random.default_rng(0))
    class_of_image = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    for inputs, targets in (episodes.support, episodes.query):
        named = episodes.labels["classes"].gather(1, targets)
        assert torch.equal(class_of_image[image_numbers(inputs)], named)


def test_no_class_and_no_image_twice_in_an_episode():
    episodes = few_shot().sample(200, np.random.default_rng(0))
    drawn = torch.cat([image_numbers(episodes.support[0]), image_numbers(episodes.query[0])], 1)
    for numbers in (drawn, episodes.labels["classes"]):
        assert all(len(set(row)) == len(row) for row in numbers.tolist())


def test_every_class_image_and_way_is_drawn_evenly():
    episodes = few_shot(of=pool((6,) * 7)).sample(3000, np.random.default_rng(0))
    # 3000 tasks × 4 ways over 7 classes: each (class, way) 3000/7 = 428.6 times, standard deviation 19
    table = torch.stack([torch.bincount(way, minlength=7) for way in episodes.labels["classes"].T])
    assert (table - 3000 / 7).abs().max() < 4.5 * 19
    images = torch.bincount(image_numbers(episodes.support[0]).flatten(), minlength=42)
    assert (images - 3000 * 8 / 42).abs().max() < 4.5 * (3000 * 8 / 42) ** 0.5


def test_subset_shares_pixels_and_keeps_class_numbers():
    whole = pool()
    part = whole.subset(np.array([4, 1])).subset(np.array([1, 0]))
    assert part.images.data_ptr() == whole.images.data_ptr()
    assert (part.names, part.ids.tolist()) == (("class 1", "class 4"), [1, 4])
    assert torch.equal(part.images_of(1), whole.images_of(4))
    episodes = few_shot(ways=2, of=part).sample(30, np.random.default_rng(0))
    assert set(episodes.labels["classes"].flatten().tolist()) == {1, 4}
    assert image_numbers(episodes.query[0]).min() >= 6  # class 0 owns images 0 … 5


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"ways": 0}, "ways: got 0, expected at least 1"),
        ({"shots": 0}, "shots: got 0, expected at least 1"),
        ({"queries": -1}, "queries: got -1, expected at least 1"),
        ({"ways": 8}, "ways: got 8, but test/train has 7 classes"),
        (
            {"shots": 4},
            r"shots \+ queries: got 4 \+ 3 = 7, but class 'class 0' of test/train has 6 images",
        ),
    ],
)
def test_numbers_the_data_cannot_serve_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        few_shot(**numbers)


def test_a_pool_whose_parts_do_not_fit_is_refused():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"images: got torch.float32 of shape \(4, 1, 2, 2\)"):
        ImagePool.from_sorted(images.float(), [4], ["a"])
    with pytest.raises(
        ValueError,
        match=r"counts: got 1 classes of 3 images in all, expected 1 classes .* of 4 images",
    ):
        ImagePool.from_sorted(images, [3], ["a"])


def test_the_stream_is_set_by_family_seed_and_position():
    def first(name="test/train", seed=0):
        return EpisodeSampler(few_shot(name=name), tasks=3, seed=seed)[0]

    assert same(first(), first())
    assert not same(first(), first(seed=1))
    assert not same(first(), first(name="test/test"))
    batches = list(islice(EpisodeSampler(few_shot(), tasks=3), 4))
    assert not any(same(batches[i], batches[j]) for i in range(4) for j in range(i))


def test_a_resumed_stream_continues_to_the_same_bits():
    whole = list(islice(EpisodeSampler(few_shot(), tasks=3, seed=7), 6))
    before = EpisodeSampler(few_shot(), tasks=3, seed=7)
    start = list(islice(before, 2))
    after = EpisodeSampler(few_shot(), tasks=3, seed=7)
    after.load_state_dict(before.state_dict())
    rest = list(islice(after, 4))
    assert all(same(a, b) for a, b in zip(whole, start + rest, strict=True))


@pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # Python 3.12 and later, of any threaded process
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_batches_are_the_stream_and_leave_torch_alone(workers):
    plain = list(islice(EpisodeSampler(few_shot(), tasks=3), 7))
    sampler = EpisodeSampler(few_shot(), tasks=3)
    state = torch.get_rng_state()
    loaded = list(sampler.batches(4, workers=workers))
    assert sampler.position == 4
    loaded += list(sampler.batches(3, workers=workers))
    assert all(same(a, b) for a, b in zip(plain, loaded, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_state_taken_between_two_loaded_batches_resumes_at_the_second():
    sampler, resumed = (EpisodeSampler(few_shot(), tasks=3) for _ in range(2))
    batches = sampler.batches(5)
    next(batches)
    resumed.load_state_dict(sampler.state_dict())
    assert same(next(batches), next(iter(resumed)))


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("tasks", 4), ("family", "other/train")])
def test_the_state_of_another_stream_is_refused(key, value):
    sampler = EpisodeSampler(few_shot(), tasks=3)
    with pytest.raises(ValueError, match=f"sampler state: got {key}={value!r}, expected"):
        sampler.load_state_dict(sampler.state_dict() | {key: value})
    with pytest.raises(ValueError, match=f"sampler state: got {key}=None"):
        sampler.load_state_dict({k: v for k, v in sampler.state_dict().items() if k != key})


def test_sampler_numbers_are_checked():
    with pytest.raises(ValueError, match="tasks: got 0, expected at least 1"):
        EpisodeSampler(few_shot(), tasks=0)
    with pytest.raises(ValueError, match="seed: got -1"):
        EpisodeSampler(few_shot(), tasks=1, seed=-1)


def test_moving_episodes_keeps_labels():
    episodes = few_shot().sample(2, np.random.default_rng(0))
    moved = episodes.to("meta")
    assert (moved.support[0].device.type, moved.query[1].device.type) == ("meta", "meta")
    assert moved.labels is episodes.labels


def test_splits_that_share_a_class_are_refused():
    whole = pool()
    parts = [
        few_shot(2, name=f"test/{i}", of=whole.subset(np.array(c)))
        for i, c in enumerate(([0, 1], [2, 3], [4, 0]))
    ]
    with pytest.raises(ValueError, match="test/0 and test/2 share 1 classes, such as 'class 0'"):
        Splits(*parts)


def test_an_unknown_family_or_option_lists_the_known(tmp_path):
    with pytest.raises(
        ValueError,
        match="task: got 'mnist', expected one of glyphs, sinusoid, omniglot, folder, learn2",
    ):
        tasks.load("mnist")
    with pytest.raises(
        ValueError, match="omniglot: got option rotation, expected data_root, rotations, split"
    ):
        tasks.load("omniglot", rotation=True)
    with pytest.raises(ValueError, match="sinusoid: got option data_root, expected none"):
        tasks.load("sinusoid", data_root=tmp_path)


def test_importing_tasks_imports_no_plotting_imaging_or_vision_library():
    heavy = "('matplotlib', 'PIL', 'torchvision', 'learn2learn', 'metaimplicit')"
    code = f"import sys, tasks; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
