"""Pools of images and of features: from sorted tensors, from datasets, and their subsets."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset

from tasks import FewShot, ImagePool

COUNTS = (6, 8, 7, 6, 9, 6, 7)


def few_shot(pool, ways=4):
    return FewShot(pool, ways=ways, shots=2, queries=3, name="test/train")


def numbered_pool():
    """A pool whose image number i has every pixel i."""
    numbers = torch.arange(sum(COUNTS), dtype=torch.uint8)
    images = numbers[:, None, None, None].repeat(1, 1, 2, 3)
    return ImagePool.from_sorted(images, COUNTS, [f"class {c}" for c in range(len(COUNTS))])


def test_a_subset_shares_pixels_and_keeps_class_numbers():
    whole = numbered_pool()
    assert whole.subset(np.arange(len(whole)) == 3).names == (whole.names[3],)
    with pytest.raises(ValueError, match=r"got \[0, 0\], expected each class once"):
        whole.subset([0, 0])
    for classes in ([1.9], 1, ["class 1"], [99]):
        with pytest.raises(
            IndexError, match=r"classes: got .*expected positions below 7, or a mask"
        ):
            whole.subset(classes)
    part = whole.subset((4, 1)).subset(np.array([1, 0]))
    assert part.images.data_ptr() == whole.images.data_ptr()
    assert part.names == ("class 1", "class 4")
    assert part.ids.tolist() == [1, 4]
    assert torch.equal(part.images_of(1), whole.images_of(4))
    episodes = few_shot(part, ways=2).sample(30, np.random.default_rng(0))
    assert set(episodes.labels["classes"].flatten().tolist()) == {1, 4}
    assert (episodes.query[0] * 255).round().min() >= 6  # class 0 has images 0 … 5


@pytest.mark.parametrize("shape", [(1,), (16,), (3, 4), (2, 5, 5), (1, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_are_inputs_as_they_are(shape, dtype):
    features = (1000 * torch.randn(sum(COUNTS), *shape)).to(dtype)
    features[:, ..., 0] = torch.arange(sum(COUNTS)).to(dtype).view(-1, *[1] * (len(shape) - 1))
    pool = ImagePool.from_sorted(features, COUNTS, map(str, range(len(COUNTS))))
    family = few_shot(pool)
    assert family.input_shape == shape
    episodes = family.sample(20, np.random.default_rng(0))
    class_of_row = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    for inputs, targets in (episodes.support, episodes.query):
        rows = inputs.flatten(2)[..., 0].long()
        assert inputs.dtype == dtype
        assert torch.equal(inputs, features[rows])
        assert torch.equal(class_of_row[rows], episodes.labels["classes"].gather(1, targets))


class Labelled:
    """A map-style dataset of pairs, which has a length and positions and nothing else."""

    def __init__(self, inputs, labels):
        self.pairs = list(zip(inputs, labels, strict=True))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, position):
        return self.pairs[range(len(self.pairs))[position]]


LABELS = [2, 10, 2, 0, 10, 10, 0, 2, 0, 0]
DATASETS = {
    "tensors": lambda x: TensorDataset(x, torch.tensor(LABELS)),
    "numbers": lambda x: Labelled(x, LABELS),
    "arrays": lambda x: Labelled(x.numpy(), np.array(LABELS)),
    "names": lambda x: Labelled(x, [f"class {label}" for label in LABELS]),
    "subset": lambda x: Subset(Labelled(x, LABELS), range(10)),
    "bytes": lambda x: Labelled((255 * x).byte().view(-1, 1, 2, 3), LABELS),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_any_dataset_of_pairs_is_a_pool_sorted_by_label(kind):
    inputs = torch.rand(10, 6)
    dataset = DATASETS[kind](inputs)
    pool = ImagePool.from_dataset(dataset)
    by_name = {str(label): [] for label in LABELS}
    for row, label in enumerate(LABELS):
        by_name[str(label)].append(row)
    assert len(pool) == 3
    assert sorted(pool.names) == sorted(
        f"class {name}" if kind == "names" else name for name in by_name
    )
    for position, name in enumerate(pool.names):
        expected = torch.stack(
            [torch.as_tensor(dataset[row][0]) for row in by_name[name.removeprefix("class ")]]
        )
        assert torch.equal(pool.images_of(position), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_that_are_not_finite_are_named(value, dtype):
    features = torch.zeros(7, 2, 3, dtype=dtype)
    features[5, 1, 2] = value
    message = "images: got NaN or Inf in input 1 of class 'dog', expected finite numbers"
    pool = ImagePool.from_sorted(features, counts=[4, 0, 3], names=["cat", "none", "dog"])
    with pytest.raises(ValueError, match=message):
        pool.require_finite()
    pool.subset([0, 1]).require_finite()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.zeros(3), torch.zeros(4)], "dataset: got inputs that do not stack .*one shape"),
        ([Image.new("RGB", (4, 4))] * 2, r"dataset: got inputs that do not stack .*PILToTensor"),
        ([], "dataset: got inputs that do not stack"),
        ([1, 2], r"images: got torch.int64 of shape \(2,\)"),
    ],
)
def test_a_dataset_that_is_no_pool_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        ImagePool.from_dataset(Labelled(inputs, range(len(inputs))))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(torch.zeros(2), float("nan"))], "dataset: label 0: got nan, expected a number or name"),
        ([(torch.zeros(2), None)], "dataset: label 0: got None, expected a number or name; leave"),
        ([(torch.zeros(2), torch.eye(3)[0])], r"label 0: got shape \(3,\), .* take the argmax"),
        ([{"image": torch.zeros(2), "label": 1}], r"item 0: got dict, expected \(input, label\)"),
        (np.ones((6, 2)), r"item 0: got ndarray, expected \(input, label\); take the two out of"),
        (torch.rand(6, 2), r"item 0: got Tensor, expected \(input, label\); take the two"),
        ([(torch.zeros(2),)], r"item 0: got tuple, expected \(input, label\); take the two"),
    ],
)
def test_items_that_are_no_pairs_and_missing_labels_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        ImagePool.from_dataset(items)


def test_features_are_data_whatever_made_them():
    features = torch.ones(4, 2, requires_grad=True) * 2
    pools = [
        ImagePool.from_dataset(TensorDataset(features, torch.tensor([0, 1, 0, 1]))),
        ImagePool.from_sorted(features, counts=[2, 2], names=["a", "b"]),
    ]
    assert not any(pool.images.requires_grad for pool in pools)


def test_labels_may_be_numbers_and_names():
    pool = ImagePool.from_dataset([(torch.full((2,), float(i)), i or "none") for i in (2, 0, 2)])
    assert pool.names == ("2", "none")
    assert pool.images.tolist() == [[2, 2], [2, 2], [0, 0]]


def test_entries_after_the_label_are_left_out():
    items = [(torch.full((2,), float(c)), c, f"note {c}") for c in (1, 0, 1)]
    pool = ImagePool.from_dataset(items)
    assert pool.names == ("0", "1")
    assert pool.images.tolist() == [[0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("dtype", "counts", "message"),
    [
        (torch.int64, [4], r"images: got torch.int64 of shape \(4, 1, 2, 2\)"),
        (torch.bool, [4], r"expected images, torch.uint8 .*, or features, float \[N, \.\.\.\]"),
        (torch.uint8, [3], r"counts: got 1 classes of 3 images in all, expected 1 .* of 4 images"),
    ],
)
def test_a_pool_whose_parts_do_not_fit_is_refused(dtype, counts, message):
    with pytest.raises(ValueError, match=message):
        ImagePool.from_sorted(torch.zeros(4, 1, 2, 2, dtype=dtype), counts, ["a"])


def test_a_negative_count_and_a_name_of_two_classes_are_refused():
    with pytest.raises(ValueError, match="counts: got -2, expected numbers ≥ 0"):
        ImagePool.from_sorted(torch.zeros(4, 3), [-2, 6], ["a", "b"])
    with pytest.raises(ValueError, match="names: got 'a' twice, expected another name for each"):
        ImagePool.from_sorted(torch.zeros(4, 3), [2, 2], ["a", "a"])


def test_a_dataset_without_a_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3), 0

    with pytest.raises(
        ValueError, match="dataset: got Stream, which has no length, expected a map"
    ):
        ImagePool.from_dataset(Stream())
