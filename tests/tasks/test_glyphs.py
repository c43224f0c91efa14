"""Characters rendered from matplotlib's fonts, and the cache they are kept in."""

import numpy as np
import pytest
import torch

import tasks
from tasks import cache, glyphs


@pytest.fixture(scope="module")
def rendered():
    return glyphs.render()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def members(rendered):
    return [{chr(int(code[2:], 16)) for code in name.split()} for name in rendered["names"]]


def test_at_least_500_classes_of_32_images_none_blank_or_cut(rendered):
    images = rendered["images"].reshape(-1, 32, 28, 28)
    assert len(images) == len(rendered["names"]) >= 500
    assert (rendered["counts"] == 32).all()
    assert images.max((2, 3)).min() > 100  # bright strokes in every image
    assert np.median(images, (2, 3)).max() == 0  # on a dark ground
    frame = np.concatenate(
        [images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1
    )
    assert (frame > 0).any(-1).mean() < 0.02  # few of them reach the frame's edge


def test_faces_and_jitters_of_a_class_all_differ(rendered):
    letter = next(i for i, group in enumerate(members(rendered)) if "R" in group)
    images = rendered["images"].reshape(-1, 32, 784)[letter].astype(int)
    apart = np.abs(images[:, None] - images).max(-1)
    assert apart[~np.eye(32, dtype=bool)].min() > 50


@pytest.mark.parametrize(
    "alike", ["AΑА", "oοо", "cCсС", "EΕЕ", "HΗН", "PΡР", "µμ", "ÐĐ", "zZΖ", "Жж", "hʰ", "‐‑"]
)
def test_look_alikes_are_one_class(rendered, alike):
    assert sum(bool(group & set(alike)) for group in members(rendered)) == 1


@pytest.mark.parametrize(
    "different", ["aAäáàâ", "ÈÉÊËĒĔĖĚ", "OQ0ØÖ", "Il1", "bdpq", "69", "∂δ", "├┤┼│", "nηh", "Яʁ"]
)
def test_other_characters_are_classes_of_their_own(rendered, different):
    of = [next(i for i, group in enumerate(members(rendered)) if c in group) for c in different]
    assert len(set(of)) == len(different)


def test_every_face_has_every_character(rendered):
    from matplotlib.ft2font import FT2Font

    maps = [FT2Font(str(face)).get_charmap() for face in glyphs.font_files()]
    assert len(maps) == 16
    assert all(ord(c) in charmap for group in members(rendered) for c in group for charmap in maps)


def test_rendering_again_gives_the_same_bits(rendered):
    faces = glyphs.font_files()[:2]
    plates = [torch.cat([glyphs.draw(face, "Rg")] * 2) for face in faces]
    first, second = (
        glyphs.warp(plates[0], glyphs.jitter(4, np.random.default_rng(3))) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first[:2], first[2:])  # the same two letters, jittered otherwise


def test_warp_places_and_scales_ink_as_its_map_says():
    plate = torch.zeros(1, 1, 128, 128)
    plate[:, :, 60:68, 60:68] = 1  # 8 plate pixels at the centre
    half = torch.tensor(
        [[[2.0, 0.0, 4.0], [0.0, 2.0, 0.0]]]
    )  # 2 plate pixels a frame pixel, looking 4 to the right
    image = glyphs.warp(plate, half)[0, 0]
    expected = torch.zeros(28, 28)
    expected[12:16, 10:14] = 1  # 4 frame pixels, moved 2 to the left
    assert (image - expected).abs().max() < 1e-5


def test_splits_are_disjoint_fixed_and_64_16_20(rendered, folder, monkeypatch):
    monkeypatch.setattr(glyphs, "render", lambda: rendered)
    splits = tasks.load("glyphs", ways=5, shots=1)
    families = (splits.train, splits.validation, splits.test)
    names = [set(family.pool.names) for family in families]
    total = len(rendered["names"])
    assert set.union(*names) == set(rendered["names"].tolist())
    assert sum(map(len, names)) == total
    np.testing.assert_allclose([len(n) / total for n in names], (0.64, 0.16, 0.20), atol=1 / total)
    assert [family.name for family in families] == [
        "glyphs/train",
        "glyphs/validation",
        "glyphs/test",
    ]
    again = tasks.load("glyphs", ways=5, shots=1)
    assert [f.pool.names for f in families] == [
        f.pool.names for f in (again.train, again.validation, again.test)
    ]
    inputs = splits.test.sample(3, np.random.default_rng(0)).query[0]
    assert inputs.shape == (3, 75, 1, 28, 28)
    assert 0 <= inputs.min() < 0.01
    assert 0.99 < inputs.max() <= 1


def test_the_cache_is_read_back_and_holds_one_whole_file(folder):
    calls = []

    def build():
        calls.append(1)
        return {"a": np.arange(3), "names": np.array(["x", "y"])}

    one, two = cache.load_or_build("thing-1", build), cache.load_or_build("thing-1", build)
    assert len(calls) == 1
    assert one["a"].tolist() == two["a"].tolist() == [0, 1, 2]
    assert two["names"].tolist() == ["x", "y"]
    assert [path.name for path in folder.iterdir()] == ["thing-1.npz"]


@pytest.mark.parametrize("damage", [b"", b"not a zip", "cut", "flip"])
def test_a_damaged_cache_is_built_anew(folder, damage):
    def build():
        return {"a": np.arange(1000)}

    cache.load_or_build("thing-1", build)
    path = folder / "thing-1.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "cut":
        damage = whole[:middle]
    elif damage == "flip":
        damage = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    path.write_bytes(damage)
    assert cache.load_or_build("thing-1", build)["a"].tolist() == list(range(1000))
    with np.load(path) as file:
        assert file["a"].tolist() == list(range(1000))


def test_a_failure_leaves_nothing_half_written(folder, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.load_or_build("thing-1", lambda: {"a": np.arange(3)})
    assert list(folder.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "file" / "cache"))
    assert cache.load_or_build("thing-1", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def test_the_cache_folder_is_the_users_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("METAIMPLICIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "metaimplicit"
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "mine"))
    assert cache.cache_dir() == tmp_path / "mine"
