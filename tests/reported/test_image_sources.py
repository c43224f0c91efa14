"""Images in the archives that few-shot data sets come in, and tasks of features."""

import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import tasks

OPTIONS = {"ways": 2, "shots": 1, "queries": 2}
PARTS = ("train", "val", "test")


def sample(family):
    return family.sample(20, np.random.default_rng(0))


def test_the_pickles_of_mini_imagenet_load(tmp_path):
    for number, part in enumerate(PARTS):
        values = 100 * number + np.arange(8)  # the gray value of an image tells its part and row
        images = np.broadcast_to(values[:, None, None, None], (8, 8, 8, 3)).astype(np.uint8)
        classes = {f"{part}{c}": list(range(4 * c, 4 * c + 4)) for c in (0, 1)}
        content = pickle.dumps({"image_data": images, "class_dict": classes})
        (tmp_path / f"mini-imagenet-cache-{part}.pkl").write_bytes(content)

    splits = tasks.load("folder", data_root=tmp_path, size=8, **OPTIONS)
    for number, family in enumerate((splits.train, splits.validation, splits.test)):
        assert list(family.classes) == [f"{PARTS[number]}0", f"{PARTS[number]}1"]
        episodes = sample(family)
        support, query = (
            (inputs[:, :, 0, 4, 4] * 255).round().long() - 100 * number
            for inputs in (episodes.support[0], episodes.query[0])
        )
        assert torch.equal((support // 4).sort().values, torch.arange(2).repeat(20, 1))
        assert torch.equal(query // 4, (support // 4).gather(1, episodes.query[1]))


@pytest.mark.parametrize(
    ("suffix", "compression"),
    [("tar", ""), ("tar.gz", "gz"), ("tgz", "gz"), ("tar.bz2", "bz2")],
)
def test_a_tar_archive_loads_as_the_folder_in_it(tmp_path, suffix, compression):
    for number in range(10):
        folder = tmp_path / "img" / f"c{number}"
        folder.mkdir(parents=True)
        for image in range(3):
            pixels = np.full((8, 8, 3), 10 * number + image, np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    with tarfile.open(tmp_path / f"img.{suffix}", f"w:{compression}") as archive:
        archive.add(tmp_path / "img", "img")

    expected, got = (
        sample(tasks.load("folder", data_root=tmp_path / root, size=8, **OPTIONS).train)
        for root in ("img", f"img.{suffix}")
    )
    assert torch.equal(got.support[0], expected.support[0])
    assert torch.equal(got.query[0], expected.query[0])


def test_tasks_of_float_features_hold_the_rows_of_their_classes():
    features = torch.randn(40, 16)
    pool = tasks.ImagePool.from_sorted(features, [4] * 10, map(str, range(10)))
    episodes = sample(tasks.FewShot(pool, name="features", **OPTIONS))
    for inputs, targets in (episodes.support, episodes.query):
        rows = (inputs[:, :, None] == features).all(-1).int().argmax(-1)
        assert torch.equal(features[rows], inputs)
        assert torch.equal(rows // 4, episodes.labels["classes"].gather(1, targets))
