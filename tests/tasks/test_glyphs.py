"""Characters rendered from matplotlib's fonts."""

import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font

import tasks
from tasks import glyphs

pytestmark = pytest.mark.slow  # the first test renders all characters


def characters_of_classes(rendered):
    """The set of characters of each class."""
    return [{chr(int(code[2:], 16)) for code in name.split()} for name in rendered["names"]]


def test_500_classes_of_32_images_have_bright_strokes_within_a_dark_frame(rendered):
    images = rendered["images"].reshape(-1, 32, 28, 28)
    assert len(images) == len(rendered["names"]) >= 500
    assert (rendered["counts"] == 32).all()
    assert images.max((2, 3)).min() > 100
    assert np.median(images, (2, 3)).max() == 0
    rows = [images[..., 0, :], images[..., -1, :]]
    columns = [images[..., 0], images[..., -1]]
    touches_edge = (np.concatenate(rows + columns, -1) > 0).any(-1)
    assert touches_edge.mean() < 0.02


def test_all_faces_and_jitters_of_a_character_differ(rendered):
    classes = characters_of_classes(rendered)
    letter = next(i for i, characters in enumerate(classes) if "R" in characters)
    images = rendered["images"].reshape(-1, 32, 784)[letter].astype(int)
    distances = np.abs(images[:, None] - images).max(-1)
    assert distances[~np.eye(32, dtype=bool)].min() > 50


@pytest.mark.parametrize(
    "alike", ["AΑА", "oοо", "cCсС", "EΕЕ", "HΗН", "PΡР", "µμ", "ÐĐ", "zZΖ", "Жж", "hʰ", "‐‑"]
)
def test_characters_that_look_alike_are_one_class(rendered, alike):
    classes = characters_of_classes(rendered)
    assert sum(bool(characters & set(alike)) for characters in classes) == 1


@pytest.mark.parametrize(
    "different", ["aAäáàâ", "ÈÉÊËĒĔĖĚ", "OQ0ØÖ", "Il1", "bdpq", "69", "∂δ", "├┤┼│", "nηh", "Яʁ"]
)
def test_characters_that_look_different_are_different_classes(rendered, different):
    classes = characters_of_classes(rendered)
    numbers = {i for c in different for i, characters in enumerate(classes) if c in characters}
    assert len(numbers) == len(different)


def test_every_face_has_every_character(rendered):
    charmaps = [FT2Font(str(face)).get_charmap() for face in glyphs.font_files()]
    assert len(charmaps) == 16
    codes = {ord(c) for characters in characters_of_classes(rendered) for c in characters}
    assert all(codes <= set(charmap) for charmap in charmaps)


def test_jitter_depends_on_its_generator_alone_and_differs_between_glyphs():
    plate = glyphs.draw(glyphs.font_files()[0], "Rg")
    plates = torch.cat([plate, plate])
    first = glyphs.warp(plates, glyphs.jitter(4, np.random.default_rng(3)))
    second = glyphs.warp(plates, glyphs.jitter(4, np.random.default_rng(3)))
    assert torch.equal(first, second)
    assert not torch.equal(first[:2], first[2:])


def test_warp_moves_and_scales_ink_as_its_map_says():
    plate = torch.zeros(1, 1, 128, 128, dtype=torch.uint8)
    plate[:, :, 60:68, 60:68] = 255  # 8 plate pixels in the centre
    # A frame pixel covers 2 plate pixels, and the frame looks 4 plate pixels to the right.
    half = torch.tensor([[[2.0, 0.0, 4.0], [0.0, 2.0, 0.0]]])
    image = glyphs.warp(plate, half)[0, 0]
    expected = torch.zeros(28, 28)
    expected[12:16, 10:14] = 1  # 4 frame pixels, 2 to the left of the centre
    assert (image - expected).abs().max() < 1e-5


def test_splits_are_fixed_and_have_64_16_20_percent_of_the_classes(rendered):
    splits = tasks.load("glyphs", ways=5, shots=1)
    again = tasks.load("glyphs", ways=5, shots=1)
    families = (splits.train, splits.validation, splits.test)
    names = [set(family.classes) for family in families]
    total = len(rendered["names"])
    assert set.union(*names) == set(rendered["names"].tolist())
    assert sum(map(len, names)) == total
    shares = [len(classes) / total for classes in names]
    np.testing.assert_allclose(shares, (0.64, 0.16, 0.20), atol=1 / total)
    for family, same in zip(families, (again.train, again.validation, again.test), strict=True):
        assert family.classes == same.classes

    inputs, _ = splits.test.sample(3, np.random.default_rng(0)).query
    assert inputs.shape == (3, 75, 1, 28, 28)
    assert 0 <= inputs.min() < 0.01
    assert 0.99 < inputs.max() <= 1
