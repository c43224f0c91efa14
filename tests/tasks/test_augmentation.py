"""Augmentation of training episodes, against a loop over images that pads, cuts and colours."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_family import few_shot

import tasks
from tasks import Augmented, EpisodeSampler
from tasks.augmentation import colour, crop_and_flip


class InFloat64:
    """A family with inputs of type float64."""

    def __init__(self, family):
        self.family = family
        self.name = family.name
        self.kind = family.kind
        self.input_shape = family.input_shape
        self.outputs = family.outputs

    def sample(self, number, rng):
        episodes = self.family.sample(number, rng)
        (support, support_targets), (query, query_targets) = episodes.support, episodes.query
        return tasks.Episodes((support.double(), support_targets), (query.double(), query_targets))


def grey(image):
    red, green, blue = image
    return 0.299 * red + 0.587 * green + 0.114 * blue


def change_by_hand(image, top, left, flip, factors, padding):
    """One image, padded, cut, flipped, and then coloured in three steps."""
    height, width = image.shape[1:]
    padded = F.pad(image[None], (padding,) * 4, mode="reflect")[0]
    image = padded[:, top : top + height, left : left + width]
    if flip:
        image = torch.stack([image[:, :, width - 1 - j] for j in range(width)], dim=2)
    brightness, contrast, saturation = factors
    image = brightness * image
    image = contrast * image + (1 - contrast) * grey(image).mean()
    image = saturation * image + (1 - saturation) * grey(image)
    return image.clamp(0, 1)


def test_an_episode_equals_a_loop_over_its_images():
    family = InFloat64(few_shot())
    got = Augmented(family, padding=3, jitter=0.5).sample(4, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    plain = family.sample(4, rng)
    for (images, targets), (before, before_targets) in (
        (got.support, plain.support),
        (got.query, plain.query),
    ):
        assert torch.equal(targets, before_targets)
        n = before.shape[0] * before.shape[1]
        corners = rng.integers(0, 7, size=(2, n))
        flips = rng.integers(0, 2, size=n)
        factors = rng.uniform(0.5, 1.5, size=(3, n))
        assert 0 < flips.sum() < n
        expected = [
            change_by_hand(image, *corners[:, i], flips[i], factors[:, i], padding=3)
            for i, image in enumerate(before.flatten(0, 1))
        ]
        assert (images.flatten(0, 1) - torch.stack(expected)).abs().max() <= 1e-12


def test_a_margin_as_wide_as_the_image_allows_is_reflected():
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")
    no = torch.tensor([False])
    for top in range(5):
        for left in range(5):
            place = [torch.tensor([top - 2]), torch.tensor([left - 2])]
            expected = padded[:, :, top : top + 3, left : left + 4]
            assert torch.equal(crop_and_flip(image, *place, flips=no), expected)


def test_factors_of_one_change_no_colour_and_their_order_does_not_matter():
    images = 0.4 + 0.2 * torch.rand(6, 3, 5, 4, dtype=torch.float64)  # none is clipped
    one = torch.ones(6, dtype=torch.float64)
    assert (colour(images, one, one, saturation=one) - images).abs().max() <= 1e-15
    b, c, s = 0.8 + 0.3 * torch.rand(3, 6, dtype=torch.float64)
    together = colour(images, b, c, saturation=s)
    saturated_first = colour(colour(images, one, one, saturation=s), one, c, saturation=one)
    assert (colour(saturated_first, b, one, saturation=one) - together).abs().max() <= 1e-14


def test_the_tasks_are_those_without_augmentation():
    family = few_shot()
    plain = EpisodeSampler(family, tasks=3, seed=7)[2]
    changed = EpisodeSampler(Augmented(family), tasks=3, seed=7)[2]
    assert torch.equal(changed.labels["classes"], plain.labels["classes"])
    same = EpisodeSampler(Augmented(family, padding=0, jitter=0.0), tasks=3, seed=7)[2]
    pairs = zip(same.query[0].flatten(0, 1), plain.query[0].flatten(0, 1), strict=True)
    for images, before in pairs:
        distances = [(images - x).abs().max() for x in (before, before.flip(-1))]
        assert min(distances) < 1e-6


def test_splits_compare_and_identify_the_classes_of_augmented_families():
    others = [few_shot(names="def", split="validation"), few_shot(names="ghi", split="test")]
    plain = tasks.Splits(few_shot(), *others)
    changed = tasks.Splits(Augmented(few_shot()), *others)
    assert changed.digests == plain.digests
    assert changed.content_digests == plain.content_digests
    with pytest.raises(ValueError, match="birds/train and birds/test share 1 classes, such as 'a'"):
        tasks.Splits(Augmented(few_shot()), others[0], few_shot(names="axy", split="test"))


class WithNames(InFloat64):
    """A family whose classes have other names in each process."""

    classes = ("birds-7f3a/a", "birds-7f3a/b")
    class_names = ("a", "b")


def test_what_identifies_classes_is_that_of_the_family():
    named = WithNames(few_shot())
    assert Augmented(named).classes == named.classes
    assert Augmented(named).class_names == named.class_names
    assert Augmented(InFloat64(few_shot())).classes == ()


def equal(first, second):
    tensors = zip((*first.support, *first.query), (*second.support, *second.query), strict=True)
    return all(torch.equal(a, b) for a, b in tensors)


# Python 3.12 and later warn of a fork of any process that has threads.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_episodes_are_the_same_by_workers_and_after_a_resume(workers):
    def sampler():
        return EpisodeSampler(Augmented(few_shot()), tasks=2, seed=3)

    expected = [sampler()[i] for i in range(4)]
    assert not equal(expected[0], expected[1])
    first = sampler()
    drawn = list(first.batches(2, workers=workers))
    second = sampler()
    second.load_state_dict(first.state_dict())
    drawn += list(second.batches(2, workers=workers))
    assert all(map(equal, drawn, expected))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (few_shot(channels=1), {}, r"augment: got birds/train, .* \(1, 10, 9\), expected natural"),
        (tasks.load("sinusoid").train, {}, "augment: got sinusoid/train, regression of inputs"),
        (few_shot(), {"padding": 9}, "padding: got 9, expected from 0 to 8"),
        (few_shot(), {"padding": -1}, "padding: got -1, expected from 0 to 8"),
        (few_shot(), {"jitter": 1.5}, "jitter: got 1.5, expected from 0 to 1"),
    ],
)
def test_what_is_no_natural_image_and_numbers_out_of_range_are_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        Augmented(family, **options)


@pytest.mark.parametrize(
    ("change", "values"),
    [(lambda x: (x - 0.5) / 0.25, "from -2 to 2"), (lambda x: x * float("nan"), "from nan to nan")],
    ids=["standardised", "NaN"],
)
def test_images_with_other_values_are_refused(change, values):
    class Changed(InFloat64):
        def sample(self, number, rng):
            episodes = super().sample(number, rng)
            images, targets = episodes.support
            return tasks.Episodes((change(images), targets), episodes.query)

    family = Augmented(Changed(few_shot()))
    with pytest.raises(ValueError, match=f"images of birds/train with values {values}"):
        family.sample(1, np.random.default_rng(0))
