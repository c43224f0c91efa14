"""Labelled sets, and the batches drawn from them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from labelled_sets import DRAWS, is_same_set, numbered

import tasks
from tasks import examples as examples_module


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
    assert moved.inputs.device.type == moved.targets.device.type == "meta"


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            torch.zeros(0, 3),
            torch.zeros(0),
            r"inputs: got shape \(0, 3\), expected \[n, \*shape\] with n ≥ 1",
        ),
        (torch.tensor(1.0), torch.tensor([1]), r"inputs: got shape \(\), expected \[n"),
        ([1.0, 2.0], torch.zeros(2), "inputs: got list, expected a tensor; convert it"),
        (torch.zeros(2), np.zeros(2), "targets: got ndarray, expected a tensor; convert it"),
        (torch.zeros(4, 3), torch.zeros(5), r"targets: got shape \(5,\), expected \[4\]"),
        (torch.zeros(4, 3), torch.zeros(4, 1), r"targets: got shape \(4, 1\), expected \[4\]"),
    ],
)
def test_examples_that_do_not_fit_together_are_refused(inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        tasks.Examples(inputs, targets)


@pytest.mark.parametrize("targets", [torch.tensor([0, -1]), torch.tensor([0.0, 1.0])])
def test_only_class_numbers_are_counted(targets):
    message = r"targets: got torch\..*, expected class numbers, integers ≥ 0"
    with pytest.raises(ValueError, match=message):
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
    epochs = [stream[first : first + 10] for first in range(0, len(stream) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert all((one == other) != shuffle for one, other in pairwise(epochs))
    assert (epochs[0] == list(range(10))) != shuffle


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_depends_on_seed_and_number_alone(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 60))
    size = int(rng.integers(2, n + 1))
    examples = numbered(n)
    batches = tasks.Batches(examples, size, seed)
    expected = [batches(i)["index"].tolist() for i in range(30)]

    torch.manual_seed(seed)
    state = torch.get_rng_state()
    asked = tasks.Batches(examples, size, seed)
    for i in rng.permutation(30):
        assert asked(int(i))["index"].tolist() == expected[i]
    assert torch.equal(torch.get_rng_state(), state)
    other = tasks.Batches(examples, size, seed + 1)
    assert [other(i)["index"].tolist() for i in range(30)] != expected


def test_a_changed_index_changes_no_later_batch():
    batches = tasks.Batches(numbered(4, 6), 4, seed=0)
    index = batches(0)["index"]
    before = index.tolist()
    index.zero_()
    assert batches(0)["index"].tolist() == before


@pytest.mark.parametrize("i", [0, 5])
def test_size_none_is_the_whole_set_in_order_without_a_copy(i):
    examples = numbered(4, 6)
    batch = tasks.Batches(examples, None, seed=0)(i)
    assert batch["index"].tolist() == list(range(10))
    assert batch["inputs"] is examples.inputs
    assert batch["targets"] is examples.targets


def test_an_epoch_is_permuted_once_even_where_batches_cross_from_one_to_the_next(monkeypatch):
    drawn = []
    stream = examples_module.random_stream

    def recorded(*names):
        drawn.append(names)
        return stream(*names)

    monkeypatch.setattr(examples_module, "random_stream", recorded)
    batches = tasks.Batches(numbered(4, 6), 4, seed=2)
    drawn.clear()
    for i in (0, 1, 2, 2, 1, 2, 3, 4):
        batches(i)
    assert drawn == [(2, 0), (2, 1)]
    for i in range(5, 100):
        batches(i)
    assert len(batches._orders) == 2


@pytest.mark.parametrize("size", [2, None])
def test_batches_stay_on_the_device_of_the_examples(size):
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
    for draw in DRAWS.values():
        for one, other in zip(draw(cpu, 0), draw(gpu, 0), strict=True):
            assert is_same_set(one, other.to("cpu"))
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
        ({"size": 2.5}, r"size: got 2.5, expected 1 … 10"),
        ({"seed": -1}, "seed: got -1, expected an integer ≥ 0"),
        ({"seed": 1.0}, "seed: got 1.0, expected an integer ≥ 0"),
    ],
)
def test_a_size_or_seed_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.Batches(numbered(4, 6), **({"size": 2, "seed": 0} | options))


@pytest.mark.parametrize("size", [2, None])
def test_a_negative_batch_number_is_refused(size):
    with pytest.raises(ValueError, match="i: got -1, expected a batch number ≥ 0"):
        tasks.Batches(numbered(4, 6), size, seed=0)(-1)
