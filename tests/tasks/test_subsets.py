"""Subsets and flaws of a labelled set, exact in their counts."""

import math

import numpy as np
import pytest
import torch
from labelled_sets import DRAWS, is_same_set, numbered, numbers

import tasks


def random_counts(seed, least):
    """The sizes of 2 to 7 classes."""
    rng = np.random.default_rng(seed)
    return rng.integers(least, 60, size=rng.integers(2, 8)).tolist()


# The sizes of a long tail


@pytest.mark.parametrize(
    ("imbalance", "expected"),
    [
        (1, [5000] * 10),
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
    ],
)
def test_long_tailed_cifar10_has_its_published_sizes(imbalance, expected):
    assert tasks.long_tailed_counts(5000, 10, imbalance) == expected


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 10, 11, 100])
@pytest.mark.parametrize("imbalance", [1, 2, 7, 8, 10, 27, 49, 81, 100, 128, 1000])
def test_long_tailed_counts_are_exact(classes, imbalance):
    """n ≤ L r^(−c/(C−1)) < n + 1, raised to the power C − 1: integers, so no rounding."""
    power = max(classes - 1, 1)
    for largest in (imbalance, 5 * imbalance, 500 * imbalance, 1024, 1300, 5000, 6000):
        if largest < imbalance:
            continue
        counts = tasks.long_tailed_counts(largest, classes, imbalance)
        for c, n in enumerate(counts):
            tail = imbalance**c
            assert n**power * tail <= largest**power < (n + 1) ** power * tail


def test_an_imbalance_that_is_no_binary_fraction_still_gives_the_integer():
    assert tasks.long_tailed_counts(11, 2, 1.1) == [11, 10]
    assert tasks.long_tailed_counts(100, 2, 100 / 3) == [100, 3]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((5000, 10, 0.01), r"imbalance: got 0\.01, expected a finite n_0 / n_last ≥ 1"),
        ((5000, 10, math.nan), "imbalance: got nan"),
        ((5000, 10, math.inf), "imbalance: got inf"),
        ((0, 10, 2), "largest: got 0, expected at least 1"),
        ((10, 0, 2), "classes: got 0, expected at least 1"),
        (
            (50, 10, 100),
            r"imbalance: got 100 for largest 50, which leaves class 8 empty; .* at most 50",
        ),
    ],
)
def test_a_long_tail_out_of_range_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        tasks.long_tailed_counts(*numbers)


# The drawn subsets


@pytest.mark.parametrize("seed", range(10))
def test_a_long_tail_has_exactly_its_counts_and_is_nested(seed):
    counts = random_counts(seed, least=20)
    examples = numbered(*counts)
    part = tasks.long_tailed(examples, 5, seed)
    assert part.counts() == tasks.long_tailed_counts(min(counts), len(counts), 5)
    assert torch.equal(examples.targets[numbers(part)], part.targets)
    assert numbers(part) == sorted(set(numbers(part)))
    stronger = tasks.long_tailed(examples, 9, seed)
    smaller = tasks.long_tailed(examples, 5, seed, largest=min(counts) - 1)
    assert set(numbers(stronger)) < set(numbers(part))
    assert set(numbers(smaller)) < set(numbers(part))


def test_the_largest_class_of_a_long_tail_may_be_given():
    examples = numbered(80, 60, 70)
    assert tasks.long_tailed(examples, 16, seed=0, largest=80).counts() == [80, 20, 5]


@pytest.mark.parametrize("seed", range(10))
def test_per_class_gives_exactly_count_of_each_class_and_all_others(seed):
    counts = random_counts(seed, least=10)
    examples = numbered(*counts)
    count = min(counts) - 1
    drawn, others = tasks.per_class(examples, count, seed)
    assert drawn.counts() == [count] * len(counts)
    assert others.counts() == [n - count for n in counts]
    assert sorted(numbers(drawn) + numbers(others)) == list(range(len(examples)))
    for part in (drawn, others):
        assert numbers(part) == sorted(numbers(part))
        assert torch.equal(examples.targets[numbers(part)], part.targets)


@pytest.mark.parametrize(
    ("share", "count"), [(0, 0), (0.1, 7), (0.3, 20), (0.5, 34), (0.999, 67), (1, 67)]
)
def test_corrupt_labels_changes_exactly_its_share_and_is_nested(share, count):
    examples = numbered(30, 20, 17)
    before = examples.targets.clone()
    wrong, changed = tasks.corrupt_labels(examples, share, seed=0)
    assert changed.dtype == torch.bool
    assert int(changed.sum()) == count == round(share * 67)
    assert torch.equal(wrong.targets != examples.targets, changed)
    assert wrong.inputs is examples.inputs
    assert wrong.targets.dtype == torch.int64
    assert set(wrong.targets.tolist()) <= {0, 1, 2}
    assert torch.equal(examples.targets, before)
    fewer_wrong, fewer = tasks.corrupt_labels(examples, share / 2, seed=0)
    assert not (fewer & ~changed).any()
    assert torch.equal(fewer_wrong.targets[fewer], wrong.targets[fewer])


def test_a_wrong_label_is_uniform_over_the_other_classes():
    examples = tasks.Examples(torch.zeros(9000, 1), torch.arange(9000) % 3)
    wrong, _ = tasks.corrupt_labels(examples, 1.0, seed=0)
    for c in range(3):
        counts = torch.bincount(wrong.targets[examples.targets == c], minlength=3)
        assert counts[c] == 0
        for other in {0, 1, 2} - {c}:
            assert abs(counts[other] - 1500) < 4 * math.sqrt(3000 / 4)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_depends_on_its_seed_alone(draw):
    examples = numbered(40, 40, 40)
    state = torch.get_rng_state()
    first = draw(examples, 0)
    assert torch.equal(torch.get_rng_state(), state)
    np.random.seed(5)
    torch.manual_seed(5)
    for one, again in zip(first, draw(examples, 0), strict=True):
        assert is_same_set(one, again)
    assert not is_same_set(first[0], draw(examples, 1)[0])
    with pytest.raises(ValueError, match="seed: got -1, expected an integer ≥ 0"):
        draw(examples, -1)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_class_without_examples_is_named(draw):
    message = r"targets: got no example of class 1 in 0 … 2; number the classes"
    with pytest.raises(ValueError, match=message):
        draw(numbered(40, 0, 40), 0)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda e: tasks.long_tailed(e, 2, seed=0, largest=40),
            "largest: class 1 needs 28 examples and has 25; lower largest",
        ),
        (lambda e: tasks.long_tailed(e, 0.5, 0), r"imbalance: got 0\.5"),
        (
            lambda e: tasks.long_tailed(e, 30, 0),
            "imbalance: got 30 for largest 25, which leaves class 2 empty",
        ),
        (
            lambda e: tasks.per_class(e, 26, 0),
            "count: class 1 needs 26 examples and has 25; lower count",
        ),
        (lambda e: tasks.per_class(e, 0, 0), "count: got 0, expected at least 1 of each class"),
        (lambda e: tasks.per_class(e, 1.5, 0), "count: got 1.5, expected at least 1 of each class"),
        (
            lambda e: tasks.per_class(numbered(5, 5), 5, 0),
            "count: got 5 of each class, which leaves no others",
        ),
        (
            lambda e: tasks.corrupt_labels(e, -0.1, 0),
            r"share: got -0\.1, expected a number in \[0, 1\]",
        ),
        (lambda e: tasks.corrupt_labels(e, 1.1, 0), r"share: got 1\.1"),
        (lambda e: tasks.corrupt_labels(e, math.nan, 0), "share: got nan"),
        (
            lambda e: tasks.corrupt_labels(numbered(5), 0.5, 0),
            "targets: got 1 class, expected at least 2",
        ),
    ],
)
def test_what_the_examples_cannot_serve_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(numbered(40, 25, 35))


# Disjoint sets


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.bool])
def test_shared_inputs_are_counted_and_named(dtype):
    """More rows than are hashed at a time. One is twice in train, and validation is transposed."""
    bits = torch.arange(4000)[:, None] >> torch.arange(12) & 1
    inputs = bits.view(4000, 3, 4).to(dtype)
    both = tasks.Examples(inputs, torch.zeros(4000, dtype=torch.int64))
    train = both.take(torch.arange(2000))
    tasks.check_disjoint(train, both.take(torch.arange(2000, 4000)))
    train = both.take(torch.arange(2001) % 2000)
    mixed = both.take(torch.tensor([2500, 0, 3999, 1200, 1200]))
    transposed = mixed.inputs.transpose(1, 2).contiguous().transpose(1, 2)
    message = r"3 of 5 inputs are in train too, .* train 0 = validation 1; .*per_class"
    with pytest.raises(ValueError, match=message):
        tasks.check_disjoint(train, tasks.Examples(transposed, mixed.targets))


def test_inputs_that_differ_in_one_bit_are_different_and_labels_do_not_matter():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    examples = tasks.Examples(x, torch.tensor([0, 1]))
    nearest = torch.nextafter(x, torch.zeros(()))
    tasks.check_disjoint(examples, tasks.Examples(nearest, examples.targets))
    relabelled = tasks.Examples(x.clone(), torch.tensor([1, 0]))
    message = "2 of 2 inputs are in train too, the first being train 0 = validation 0"
    with pytest.raises(ValueError, match=message):
        tasks.check_disjoint(examples, relabelled)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            torch.zeros(2, 4),
            r"got inputs \('torch.float32', \(4,\)\), expected \('torch.float32', \(3,\)",
        ),
        (
            torch.zeros(2, 3, dtype=torch.float64),
            r"got inputs \('torch.float64'.*compare both before standardising",
        ),
    ],
)
def test_inputs_of_another_shape_or_type_cannot_be_compared(inputs, message):
    train = tasks.Examples(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        tasks.check_disjoint(train, tasks.Examples(inputs, train.targets))
