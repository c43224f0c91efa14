"""Labelled sets, the batches drawn from them, and splits that are exact in their counts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import tasks
from tasks import examples as examples_module

SPLITS = {
    "long_tailed": lambda examples, seed: [tasks.long_tailed(examples, 10, seed)],
    "per_class": lambda examples, seed: [*tasks.per_class(examples, 7, seed)],
    "corrupt_labels": lambda examples, seed: [tasks.corrupt_labels(examples, 0.3, seed)[0]],
}


def numbered(*counts):
    """`counts[c]` examples of class c, shuffled; an input is its example's number."""
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    targets = targets[torch.from_numpy(np.random.default_rng(1).permutation(len(targets)))]
    return tasks.Examples(torch.arange(len(targets)).view(-1, 1), targets)


def rows(examples):
    return examples.inputs[:, 0].tolist()


def test_examples_are_taken_by_position_and_by_mask():
    examples = tasks.Examples(torch.arange(12).view(4, 3), torch.tensor([2, 0, 2, 1]))
    assert len(examples) == 4
    assert examples.counts() == [1, 1, 2]
    taken = examples.take(torch.tensor([2, 0, 2]))
    assert taken.inputs.tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]
    assert taken.targets.tolist() == [2, 2, 2]
    assert examples.take(examples.targets == 2).inputs[:, 0].tolist() == [0, 6]
    assert examples.take(torch.tensor([3])).counts() == [0, 1]
    moved = examples.to("meta")
    assert (moved.inputs.device.type, moved.targets.device.type) == ("meta", "meta")


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            torch.zeros(0, 3),
            torch.zeros(0),
            r"inputs: got shape \(0, 3\), expected \[n, \*shape\] with n ≥ 1",
        ),
        (torch.tensor(1.0), torch.tensor([1]), r"inputs: got shape \(\), expected \[n"),
        (torch.zeros(4, 3), torch.zeros(5), r"targets: got shape \(5,\), expected \[4\]"),
        (torch.zeros(4, 3), torch.zeros(4, 1), r"targets: got shape \(4, 1\), expected \[4\]"),
    ],
)
def test_examples_that_do_not_fit_together_are_refused(inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        tasks.Examples(inputs, targets)


@pytest.mark.parametrize("targets", [torch.tensor([0, -1]), torch.tensor([0.0, 1.0])])
def test_only_class_numbers_are_counted(targets):
    with pytest.raises(
        ValueError, match=r"targets: got torch\..*, expected class numbers, integers ≥ 0"
    ):
        tasks.Examples(torch.zeros(2, 1), targets).counts()


@pytest.mark.parametrize("size", [1, 3, 4, 10])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_run_through_one_permutation_after_another(size, shuffle):
    examples = numbered(4, 6)
    batches = tasks.Batches(examples, size, seed=3, shuffle=shuffle)
    drawn = [batches(i) for i in range(30)]
    for batch in drawn:
        assert batch["index"].dtype == torch.int64
        assert batch["index"].shape == (size,)
        assert torch.equal(batch["inputs"], examples.inputs[batch["index"]])
        assert torch.equal(batch["targets"], examples.targets[batch["index"]])
    stream = torch.cat([batch["index"] for batch in drawn]).tolist()
    epochs = [stream[at : at + 10] for at in range(0, len(stream) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert all((one == other) != shuffle for one, other in pairwise(epochs))
    assert (epochs[0] == list(range(10))) != shuffle


def test_a_batch_depends_on_seed_and_number_alone():
    examples = numbered(20, 30)
    batches = tasks.Batches(examples, 8, seed=0)
    forward = [batches(i)["index"].tolist() for i in range(40)]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert [batches(i)["index"].tolist() for i in reversed(range(40))] == forward[::-1]
    assert tasks.Batches(examples, 8, 0)(33)["index"].tolist() == forward[33]
    assert torch.equal(torch.get_rng_state(), state)
    assert tasks.Batches(examples, 8, 1)(0)["index"].tolist() != forward[0]


def test_a_changed_index_changes_no_later_batch():
    batches = tasks.Batches(numbered(4, 6), 4, seed=0)
    index = batches(0)["index"]
    before = index.tolist()
    index.zero_()
    assert batches(0)["index"].tolist() == before


def test_size_none_is_the_whole_set_in_order_without_a_copy():
    examples = numbered(4, 6)
    for i in (0, 5):
        batch = tasks.Batches(examples, None, seed=0)(i)
        assert batch["index"].tolist() == list(range(10))
        assert batch["inputs"] is examples.inputs
        assert batch["targets"] is examples.targets


def test_an_epoch_is_permuted_once_even_where_batches_lie_across_two(monkeypatch):
    drawn = []
    stream = examples_module.random_stream
    monkeypatch.setattr(
        examples_module, "random_stream", lambda *names: drawn.append(names) or stream(*names)
    )
    batches = tasks.Batches(numbered(4, 6), 4, seed=2)
    drawn.clear()
    for i in (0, 1, 2, 2, 1, 2, 3, 4):
        batches(i)
    assert drawn == [(2, 0), (2, 1)]
    for i in range(5, 100):
        batches(i)
    assert len(batches._orders) == 2


def test_batches_stay_on_the_device_of_the_examples():
    for size in (2, None):
        batch = tasks.Batches(numbered(2, 3).to("meta"), size, seed=0)(1)
        assert {part.device.type for part in batch.values()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_everything_is_the_same_on_a_gpu():
    cpu = numbered(20, 30)
    gpu = cpu.to("cuda")
    batch = tasks.Batches(gpu, 8, 0)(6)
    assert {part.device.type for part in batch.values()} == {"cuda"}
    assert torch.equal(batch["index"].cpu(), tasks.Batches(cpu, 8, 0)(6)["index"])
    for split in SPLITS.values():
        for one, other in zip(split(cpu, 0), split(gpu, 0), strict=True):
            assert torch.equal(one.inputs, other.inputs.cpu())
            assert torch.equal(one.targets, other.targets.cpu())
    with pytest.raises(ValueError, match="validation: 50 of 50"):
        tasks.check_disjoint(cpu, gpu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": 0},
            r"size: got 0, expected 1 … 10, the number of examples; None is the whole set",
        ),
        ({"size": 11}, r"size: got 11, expected 1 … 10"),
        ({"seed": -1}, "seed: got -1, expected an integer ≥ 0"),
    ],
)
def test_senseless_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.Batches(numbered(4, 6), **({"size": 2, "seed": 0} | options))


@pytest.mark.parametrize("size", [2, None])
def test_a_negative_batch_number_is_refused(size):
    with pytest.raises(ValueError, match="i: got -1, expected a batch number ≥ 0"):
        tasks.Batches(numbered(4, 6), size, seed=0)(-1)


@pytest.mark.parametrize(
    ("imbalance", "expected"),
    [
        (1, [5000] * 10),
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
    ],
)
def test_the_published_sizes_of_long_tailed_cifar10(imbalance, expected):
    assert tasks.long_tailed_counts(5000, 10, imbalance) == expected


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 10, 11, 100])
@pytest.mark.parametrize("imbalance", [1, 2, 7, 8, 10, 27, 49, 81, 100, 128, 1000])
def test_long_tailed_counts_are_exact(classes, imbalance):
    """n ≤ L r^(−c/(C−1)) < n + 1, raised to the power C − 1: integers, so no rounding."""
    power = max(classes - 1, 1)
    for largest in (imbalance, 5 * imbalance, 500 * imbalance, 1024, 1300, 5000, 6000):
        if largest >= imbalance:
            for c, n in enumerate(tasks.long_tailed_counts(largest, classes, imbalance)):
                assert n**power * imbalance**c <= largest**power < (n + 1) ** power * imbalance**c


def test_a_ratio_that_is_no_binary_fraction_still_gives_the_integer():
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
def test_senseless_long_tails_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        tasks.long_tailed_counts(*numbers)


def test_long_tailed_has_exactly_its_counts():
    examples = numbered(80, 60, 70)
    assert tasks.long_tailed(examples, 16, seed=0).counts() == [60, 15, 3]
    part = tasks.long_tailed(examples, 16, seed=0, largest=80)
    assert part.counts() == [80, 20, 5]
    assert torch.equal(examples.targets[rows(part)], part.targets)
    assert rows(part) == sorted(set(rows(part)))
    assert set(rows(tasks.long_tailed(examples, 20, 0, 80))) < set(rows(part))


def test_per_class_gives_exactly_count_of_each_and_all_the_others():
    examples = numbered(20, 15, 30)
    few, others = tasks.per_class(examples, 15, seed=0)
    assert few.counts() == [15, 15, 15]
    assert others.counts() == [5, 0, 15]
    assert sorted(rows(few) + rows(others)) == list(range(65))
    for part in (few, others):
        assert rows(part) == sorted(rows(part))
        assert torch.equal(examples.targets[rows(part)], part.targets)


@pytest.mark.parametrize(
    ("share", "count"), [(0, 0), (0.1, 7), (0.3, 20), (0.5, 34), (0.999, 67), (1, 67)]
)
def test_corrupt_labels_changes_exactly_its_share(share, count):
    examples = numbered(30, 20, 17)
    before = examples.targets.clone()
    wrong, mask = tasks.corrupt_labels(examples, share, seed=0)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == count == round(share * 67)
    assert torch.equal(wrong.targets != examples.targets, mask)
    assert wrong.inputs is examples.inputs
    assert wrong.targets.dtype == torch.int64
    assert set(wrong.targets.tolist()) <= {0, 1, 2}
    assert torch.equal(examples.targets, before)
    less, smaller = tasks.corrupt_labels(examples, share / 2, seed=0)
    assert not (smaller & ~mask).any()
    assert torch.equal(less.targets[smaller], wrong.targets[smaller])


def test_a_wrong_label_is_uniform_over_the_other_classes():
    wrong, _ = tasks.corrupt_labels(
        tasks.Examples(torch.zeros(9000, 1), torch.arange(9000) % 3), 1.0, seed=0
    )
    for c in range(3):
        counts = torch.bincount(wrong.targets[torch.arange(9000) % 3 == c], minlength=3)
        assert counts[c] == 0
        assert all(abs(counts[other] - 1500) < 4 * math.sqrt(3000 / 4) for other in {0, 1, 2} - {c})


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_depends_on_its_seed_alone(split):
    examples = numbered(40, 40, 40)
    state = torch.get_rng_state()
    one, again, other = (SPLITS[split](examples, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    np.random.seed(5)
    torch.manual_seed(5)
    for first, second in ((one, again), (one, SPLITS[split](examples, 0))):
        for x, y in zip(first, second, strict=True):
            assert torch.equal(x.inputs, y.inputs)
            assert torch.equal(x.targets, y.targets)
    assert rows(one[0]) != rows(other[0]) or not torch.equal(one[0].targets, other[0].targets)
    with pytest.raises(ValueError, match="seed: got -1, expected an integer ≥ 0"):
        SPLITS[split](examples, -1)


@pytest.mark.parametrize("split", SPLITS)
def test_an_absent_class_is_named(split):
    with pytest.raises(
        ValueError, match=r"targets: got no example of class 1 in 0 … 2; number the classes"
    ):
        SPLITS[split](numbered(40, 0, 40), 0)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            lambda e: tasks.long_tailed(e, 2, 0, 40),
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
def test_what_the_examples_cannot_serve_is_refused(split, message):
    with pytest.raises(ValueError, match=message):
        split(numbered(40, 25, 35))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.bool])
def test_shared_inputs_are_counted_and_named(dtype):
    """More rows than are hashed at a time, one of them twice in train; validation is transposed in memory."""
    bits = torch.arange(4000)[:, None] >> torch.arange(12) & 1
    both = tasks.Examples(bits.view(4000, 3, 4).to(dtype), torch.zeros(4000, dtype=torch.int64))
    train, validation = both.take(torch.arange(2000)), both.take(torch.arange(2000, 4000))
    tasks.check_disjoint(train, validation)
    train = both.take(torch.arange(2001) % 2000)
    mixed = both.take(torch.tensor([2500, 0, 3999, 1200, 1200]))
    mixed = tasks.Examples(mixed.inputs.transpose(1, 2).contiguous().transpose(1, 2), mixed.targets)
    with pytest.raises(
        ValueError, match=r"3 of 5 inputs are in train too, .* train 0 = validation 1; .*per_class"
    ):
        tasks.check_disjoint(train, mixed)


def test_one_bit_is_a_difference_and_a_label_is_none():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    examples = tasks.Examples(x, torch.tensor([0, 1]))
    tasks.check_disjoint(
        examples, tasks.Examples(torch.nextafter(x, torch.zeros(())), examples.targets)
    )
    with pytest.raises(
        ValueError, match="2 of 2 inputs are in train too, the first being train 0 = validation 0"
    ):
        tasks.check_disjoint(examples, tasks.Examples(x.clone(), torch.tensor([1, 0])))


def test_inputs_whose_bits_say_nothing_are_refused():
    examples, other = (tasks.Examples(torch.zeros(2, n), torch.tensor([0, 1])) for n in (3, 4))
    with pytest.raises(
        ValueError,
        match=r"got inputs \('torch.float32', \(4,\)\), expected \('torch.float32', \(3,\)",
    ):
        tasks.check_disjoint(examples, other)
    with pytest.raises(
        ValueError, match=r"got inputs \('torch.float64'.*compare both before standardising"
    ):
        tasks.check_disjoint(examples, tasks.Examples(examples.inputs.double(), examples.targets))
