"""Any labelled data set: of Pillow's images, tensors or arrays, with and without a split."""

import numpy as np
import pytest
import torch
from image_files import encode, no_network, write_tree
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import tasks
from tasks import ImagePool

CLASSES = 10
ROWS = 4  # of a class
LABELS = np.arange(CLASSES * ROWS) % CLASSES  # not sorted
NAMES = [f"kind {c}" for c in range(CLASSES)]
SPLIT = {"train": [3, 1], "val": [7, 2], "test": [5, 9]}


def load(dataset, **options):
    return tasks.load("dataset", dataset=dataset, **({"ways": 1, "queries": 2} | options))


def families(splits):
    return (splits.train, splits.validation, splits.test)


def pixels():
    """uint8 `[n, 8, 8, 3]`, all different."""
    return np.random.default_rng(0).integers(0, 256, (len(LABELS), 8, 8, 3), np.uint8)


class Pairs:
    """A map-style dataset."""

    def __init__(self, inputs, labels=LABELS, **attributes):
        self.inputs = inputs
        self.labels = labels
        vars(self).update(attributes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return self.inputs[number], self.labels[number]


IMAGES = {
    "Pillow": lambda: Pairs([Image.fromarray(image) for image in pixels()]),
    "Pillow, with names": lambda: Pairs([*map(Image.fromarray, pixels())], classes=NAMES),
    "arrays": lambda: Pairs(pixels()),
    "tensors": lambda: TensorDataset(
        torch.from_numpy(pixels()).permute(0, 3, 1, 2), torch.from_numpy(LABELS)
    ),
    "a pair": lambda: (pixels(), LABELS),
    "a pair of tensors": lambda: (torch.from_numpy(pixels()), torch.from_numpy(LABELS)),
    "names as labels": lambda: Pairs(pixels(), [NAMES[label] for label in LABELS]),
    "names with blanks": lambda: Pairs(
        pixels(), [f" {NAMES[c]}  "[i % 2 :] for i, c in enumerate(LABELS)]
    ),
}


@pytest.mark.parametrize("form", IMAGES)
def test_images_of_every_form_give_the_pixels_of_their_classes(form):
    by_name = "names" in form
    split = {part: [NAMES[c] if by_name else c for c in c_s] for part, c_s in SPLIT.items()}
    splits = load(IMAGES[form](), split=split, size=8)
    for family, numbers in zip(families(splits), SPLIT.values(), strict=True):
        assert family.classes == tuple(NAMES[c] if by_name else str(c) for c in numbers)
        for position, c in enumerate(numbers):
            expected = pixels()[c == LABELS].transpose(0, 3, 1, 2)
            assert np.array_equal(family.pool.images_of(position), expected)


@pytest.mark.parametrize("inputs", [torch.randn(40, 5), torch.randn(40, 3, 2).double()])
def test_features_stay_as_they_are_and_classes_are_shuffled(inputs):
    for dataset in ((inputs, LABELS), TensorDataset(inputs, torch.from_numpy(LABELS))):
        splits = load(dataset, seed=3)
        assert [len(family.classes) for family in families(splits)] == [6, 2, 2]
        for family in families(splits):
            assert family.pool.images.dtype == torch.float32
            for position, name in enumerate(family.classes):
                expected = inputs[int(name) == LABELS].float()
                assert torch.equal(family.pool.images_of(position), expected)
        assert splits.source == (
            "the dataset, shuffled by seed 3, since nothing splits the classes"
        )
        assert load(dataset, seed=4).digests != splits.digests


def test_images_are_resized_as_files_are(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 9, 14, 3), np.uint8)
    for image, label, number in zip(images, LABELS, range(40), strict=True):
        write_tree(tmp_path, {f"{label}/{number:02d}.png": encode(image)})
    expected = tasks.load("folder", data_root=tmp_path, ways=1, queries=2, size=5, color=False)
    for dataset in ((images, LABELS), Pairs([*map(Image.fromarray, images)])):
        splits = load(dataset, size=5, color=False)
        assert splits.digests == expected.digests
        assert torch.equal(splits.train.pool.images, expected.train.pool.images)


def with_palette():
    return [Image.fromarray(image).quantize(16) for image in pixels()]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ((with_palette(), LABELS), Pairs(with_palette())),
        ((list(pixels()), LABELS), (pixels(), LABELS)),
        ([pixels(), LABELS], (pixels(), LABELS)),
        ([*zip(pixels(), LABELS, range(40), strict=True)], (pixels(), LABELS)),
    ],
    ids=["a list of images with palettes", "a list of arrays", "a list of two", "triples"],
)
def test_examples_in_lists_are_read_as_those_of_data_sets_and_arrays(dataset, expected):
    got = load(dataset, size=8)
    assert got.content_digests == load(expected, size=8).content_digests


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_are_of_any_float_type_and_may_need_gradients(dtype):
    inputs = torch.randn(40, 5).to(dtype).requires_grad_()
    expected = load((inputs.detach().float(), LABELS)).content_digests
    for dataset in ((inputs, LABELS), Pairs(inputs)):
        assert load(dataset).content_digests == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_float_images_in_two_splits_are_named_and_features_may_repeat(channels):
    images = torch.rand(20, channels, 4, 5)
    labels = np.arange(40) % 5
    repeated = (torch.cat([images, images]), labels + 5 * (np.arange(40) > 19))
    split = {"train": range(5), "val": [5, 6], "test": [7, 8, 9]}
    with pytest.raises(ValueError, match=r"equal images in two splits: 20, the first being image"):
        load(repeated, split=split, queries=1)
    load(repeated, split=split, queries=1, allow_repeats=True)

    inputs, labels = repeated
    for features in (inputs.flatten(1), inputs.transpose(1, 2), torch.ones_like(inputs)):
        load((features, labels), split=split, queries=1)


def test_an_example_that_a_subset_has_twice_is_named():
    """Its copy could be a query of the task that adapts on it. Equal features could be chance."""
    inputs = torch.ones(40, 3)
    dataset = TensorDataset(inputs, torch.arange(40) % 5)
    load(Subset(dataset, range(40)))
    twice = Subset(ConcatDataset([dataset, dataset]), [*range(40), 43])
    message = r"copies of examples in one class: 1, the first being example 0 of class '3' = exa"
    with pytest.warns(UserWarning, match=message):
        load(twice)
    load(twice, allow_repeats=True)


def test_three_data_sets_are_a_split(tmp_path):
    parts = {"base": (0, 1, 2), "validation": (3, 4), "novel": (5, 6)}
    dataset = {}
    for part, numbers in parts.items():
        rows = np.isin(LABELS, numbers)
        dataset[part] = (pixels()[rows], LABELS[rows])
    splits = load(dataset, size=8)
    loaded = [[int(name) for name in family.classes] for family in families(splits)]
    assert loaded == [list(numbers) for numbers in parts.values()]
    assert splits.source == "the dataset, split by its parts"


def test_a_data_set_of_torchvision_is_taken_by_its_name(tmp_path, monkeypatch):
    made = []

    class Things(Pairs):
        def __init__(self, root, train=True, transform=None, download=False):
            made.append((root, train, download))
            half = slice(0, 20) if train else slice(20, 40)
            super().__init__([*map(Image.fromarray, pixels()[half])], LABELS[half], classes=NAMES)

    monkeypatch.setattr("torchvision.datasets.Things", Things, raising=False)
    splits = load("Things", data_root=tmp_path, size=8)
    assert made == [(tmp_path, True, True), (tmp_path, False, True)]
    names = [name for family in families(splits) for name in family.classes]
    assert sorted(names) == NAMES
    assert (splits.train.pool.counts == ROWS).all()
    assert splits.source.startswith("torchvision's Things, shuffled")

    Things.__init__ = lambda self, root, train=True, download=False: no_network()
    with pytest.raises(FileNotFoundError, match="Things: could not download it"):
        load("Things", data_root=tmp_path)


@pytest.mark.parametrize(
    "classes",
    [
        None,
        CLASSES,
        set(NAMES),
        lambda: NAMES,
        {name: c for c, name in enumerate(NAMES)},
        [*range(CLASSES)],
        np.arange(CLASSES),
        torch.arange(CLASSES),
    ],
    ids=["none", "their number", "a set", "a method", "by name", "a list", "an array", "a tensor"],
)
def test_labels_are_the_classes_where_classes_are_no_names(classes):
    dataset = Pairs(pixels(), classes=classes)
    assert load(dataset, size=8).content_digests == load(Pairs(pixels()), size=8).content_digests


@pytest.mark.parametrize("classes", [dict(enumerate(NAMES)), np.array(NAMES)])
def test_names_by_position_are_those_of_a_list(classes):
    expected = load(Pairs(pixels(), classes=NAMES), size=8).content_digests
    assert load(Pairs(pixels(), classes=classes), size=8).content_digests == expected


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: Subset(x, range(len(x)))])
def test_joined_datasets_have_their_own_classes(wrap):
    others = [f"other {c}" for c in range(CLASSES)]
    parts = [Pairs(pixels(), classes=NAMES), Pairs(255 - pixels(), LABELS[::-1], classes=others)]
    splits = load(ConcatDataset(map(wrap, parts)), size=8)
    names = [NAMES[c] for c in LABELS] + [others[c] for c in LABELS[::-1]]
    expected = load(Pairs(np.concatenate([pixels(), 255 - pixels()]), names), size=8)
    assert splits.content_digests == expected.content_digests
    same = ConcatDataset([wrap(Pairs(255 - pixels(), classes=NAMES)), parts[0]])
    assert {name for family in families(load(same, size=8)) for name in family.classes} == {*NAMES}


def test_datasets_that_are_joined_and_cut_in_any_order_have_their_own_classes():
    others = [f"other {c}" for c in range(CLASSES)]
    parts = [Pairs(pixels(), classes=NAMES), Pairs(255 - pixels(), classes=others)]
    parts.append(Pairs(pixels()[::-1] // 2, classes=NAMES))
    whole = ConcatDataset(parts)
    expected = load(whole, size=8).content_digests
    in_turn = ConcatDataset([ConcatDataset(parts[:2]), parts[2]])
    assert load(in_turn, size=8).content_digests == expected
    assert load(Subset(in_turn, range(len(whole))), size=8).content_digests == expected
    half = len(parts[0]) + 2
    from_the_end = [i - len(whole) for i in range(half, len(whole))]
    cut = [Subset(in_turn, range(half)), Subset(in_turn, from_the_end)]
    assert load(ConcatDataset(cut), size=8).content_digests == expected
    for family in families(load(Subset(parts[0], range(len(parts[0]))), size=8)):
        assert set(family.classes) <= set(NAMES)


def test_a_subset_that_relabels_has_classes_of_its_own():
    class Relabelled(Subset):
        def __getitem__(self, i):
            value, label = super().__getitem__(i)
            return value, CLASSES - 1 - label

        def __getitems__(self, positions):
            return [self[i] for i in positions]

    part = Relabelled(Pairs(pixels(), classes=NAMES), range(len(LABELS)))
    names = {name for family in families(load(part, size=8)) for name in family.classes}
    assert names == set(map(str, range(CLASSES)))


def test_classes_are_read_once_however_many_examples_there_are():
    reads = []

    class Counting(Pairs):
        @property
        def classes(self):
            reads.append(1)
            return NAMES

    load(Counting(pixels()), size=8)
    assert len(reads) == 1


def test_a_split_without_classes_asks_for_more():
    with pytest.raises(ValueError, match=r"dataset/validation has 0 classes; give it more classes"):
        load((np.random.default_rng(0).random((30, 4)), np.arange(30) % 3))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("given_as", [np.asarray, torch.from_numpy])
def test_a_dataset_may_give_one_buffer_again(dtype, given_as):
    class Reader(Pairs):
        buffer = np.zeros((3, 8, 8), dtype)

        def __getitem__(self, number):
            self.buffer[...] = np.random.default_rng(number).integers(0, 255, self.buffer.shape)
            return given_as(self.buffer), LABELS[number]

    dataset = Reader(pixels())
    for pool in [load(dataset, size=8).train.pool, ImagePool.from_dataset(dataset)]:
        images = pool.images.flatten(1)
        assert len(images.unique(dim=0)) == len(images)


def test_a_random_transform_is_warned_of():
    class RandomPairs(Pairs):
        def __getitem__(self, number):
            inputs, label = super().__getitem__(number)
            return inputs + rng.random(5), label

    rng = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="dataset: input 0 is another one when it is read again"):
        load(RandomPairs(np.zeros((len(LABELS), 5))))


@pytest.mark.parametrize("numbers", [LABELS + 1, 3 * LABELS])
def test_labels_that_are_listed_as_classes_are_no_positions(numbers):
    dataset = Pairs(pixels(), numbers, classes=np.unique(numbers).tolist())
    expected = load(Pairs(pixels(), numbers), size=8).content_digests
    assert load(dataset, size=8).content_digests == expected


@pytest.mark.parametrize("form", [np.array, torch.tensor])
def test_a_split_is_given_in_arrays(form):
    split = {part: form(numbers) for part, numbers in SPLIT.items()}
    assert (
        load((pixels(), LABELS), split=split).digests == load(Pairs(pixels()), split=SPLIT).digests
    )


MISSING = [float(label) for label in LABELS[:5]] + [float("nan")] + [1.0] * 34
ROWS_BY_NAME = [{"image": image, "label": c} for image, c in zip(pixels(), LABELS, strict=True)]


def in_parts(**inputs):
    """Three data sets of two classes each, the inputs of some of which are given."""
    parts = ("train", "val", "test")
    return {
        part: (inputs.get(part, pixels()[8 * i : 8 * i + 8]), 2 * i + np.arange(8) % 2)
        for i, part in enumerate(parts)
    }


TWICE = {part: (pixels()[:20], LABELS[:20]) for part in ("train", "val", "test")}


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (None, {}, "dataset: got NoneType, expected a map-style dataset"),
        (3, {}, "dataset: got int, expected a map-style dataset"),
        ("Nothing", {}, "dataset: got 'Nothing', expected the name of a data set in torchvision"),
        ("PhotoTour", {}, "dataset: got 'PhotoTour', expected the name of a data set in torch"),
        ("ImageFolder", {}, "dataset: got 'ImageFolder', expected the name"),
        ((pixels(), LABELS[:-1]), {}, r"labels of shape \(39,\), expected labels \(40,\)"),
        ((pixels().astype(int), LABELS), {}, "dataset: got int64 of shape"),
        (Pairs(pixels(), []), {}, "got inputs of no examples, expected one type"),
        (Pairs([np.zeros(3), *[np.zeros(4)] * 39]), {}, r"float32 \(3,\), float32 \(4,\), expec"),
        (Pairs(pixels(), np.eye(40)), {}, r"dataset: label 0: got shape \(40,\), expected one num"),
        ({"train": 1, "val": 2}, {}, "dataset: got a dictionary of train, val, expected train, v"),
        (TWICE, {}, "dataset: class '0' is in two of train, val, test"),
        (ROWS_BY_NAME, {}, r"dataset: item 0: got dict, expected \(input, label\); take the two"),
        (
            ([Image.new("HSV", (8, 8))] * 40, LABELS),
            {},
            "dataset: input 0: got an image of Pillow's mode 'HSV', expected grey, RGB or CMYK",
        ),
        (torch.rand(40, 2), {}, r"dataset: item 0: got Tensor, expected \(input, label\)"),
        ([1, 2, 3], {}, r"dataset: item 0: got int, expected \(input, label\)"),
        (Pairs(pixels(), classes=[*NAMES[:9], " kind  3"]), {}, "'kind 3' .* at 3 and 9, expected"),
        (
            Pairs(pixels(), LABELS + 1, classes=[str(c + 1) for c in range(CLASSES)]),
            {},
            "no name for 10 in the 10 of dataset.classes, expected positions there, from 0 on",
        ),
        ((pixels(), MISSING), {}, "dataset: label 5: got nan, expected a number or name; leave"),
        ((pixels(), [*NAMES * 3, *NAMES[1:], np.nan]), {}, "dataset: label 39: got nan, expected"),
        (Pairs(pixels(), MISSING), {}, "dataset: label 5: got nan, expected a number or name"),
        (Pairs(pixels(), [None] * 40), {}, "dataset: label 0: got None, expected a number or name"),
        (
            in_parts(test=torch.rand(8, 3, 8, 8)),
            {"size": 8},
            r"got inputs uint8 \(3, 8, 8\) in train, uint8 .* in val, float32 .* in test, expected",
        ),
        (in_parts(test=torch.rand(8, 5)), {}, r"float32 \(5,\) in test, expected one type and"),
        ((pixels()[:0], LABELS[:0]), {}, "dataset: got no examples, expected several of each"),
        ((pixels(), LABELS), {"split": [0.6, 0.4]}, r"split: got \[0.6, 0.4\], expected a dict"),
        ((pixels(), LABELS), {"split": {"train": [1]}}, "split: got a dictionary of train, exp"),
        ((pixels(), LABELS), {"split": SPLIT | {"val": 3}}, "split: got 3 for a part, expected a"),
        ((pixels(), LABELS), {"split": SPLIT | {"val": "34"}}, "split: got '34' for a part, exp"),
        (
            (Pairs(pixels()), Pairs(pixels())),
            {},
            "dataset: got a tuple of Pairs and Pairs, expected a map-style dataset of pairs",
        ),
        ((pixels(), LABELS), {"split": SPLIT | {"val": [77]}}, "split: got class '77', expected"),
        ((pixels(), LABELS), {"split": SPLIT | {"val": [3]}}, "share 1 classes, such as '3'"),
        (
            (np.concatenate([pixels()[:20]] * 2), LABELS * 2 + (np.arange(40) > 19)),
            {},
            r"equal images in two splits: \d+, the first being image \d of class '\d+'",
        ),
    ],
)
def test_what_is_wrong_is_named(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        load(dataset, **options)
