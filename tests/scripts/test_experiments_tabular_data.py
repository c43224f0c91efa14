"""Tables of features from files."""

import pytest
import torch
from experiments.regularization import Regularization
from experiments.runner import execute
from experiments.tabular_data import newsgroups, split, svmlight

pytest.importorskip("sklearn")


@pytest.fixture
def tiny(tmp_path):
    """A file in libsvm's format: 16 examples of features i, 0 and i²."""
    path = tmp_path / "tiny"
    lines = [f"{'+1' if i % 2 else '-1'} 1:{i} 3:{i * i}\n" for i in range(16)]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def news(tmp_path):
    """A folder with a folder of six texts for each of two classes, in Latin 1."""
    for name, words in {"cats": "purr whiskers purr", "dogs": "bark fetch"}.items():
        folder = tmp_path / "news" / name
        folder.mkdir(parents=True)
        for i in range(6):
            (folder / str(i)).write_text(f"{words} café", encoding="latin-1")
    return tmp_path / "news"


def test_a_file_in_libsvms_format_is_read(tiny):
    examples = svmlight(tiny)
    assert examples.targets.tolist() == [i % 2 for i in range(16)]
    assert examples.inputs[3].tolist() == [3.0, 0.0, 9.0]


def test_a_split_is_standardised_without_its_constant_features(tiny):
    parts = split(svmlight(tiny), 0)
    assert [len(part) for part in parts] == [8, 4, 4]
    inputs = parts[0].inputs
    assert inputs.shape == (8, 2)  # the second feature is always 0
    assert inputs.mean(0).abs().max() < 1e-12
    assert inputs.std(0, correction=0).tolist() == pytest.approx([1, 1])


def test_a_file_is_a_set_beside_those_of_scikit_learn(tiny, tmp_path):
    experiment = Regularization(
        libsvm=tiny,
        data=("breast-cancer",),
        quick=True,
        method=("hoag", "grid"),
        out=tmp_path / "out",
    )
    table = execute(experiment)
    assert "| breast-cancer |" in table
    assert "| tiny | `hoag` from 1 |" in table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1 1:x\n2 1:3\n",
            r"tiny: got a file that cannot be read .*, expected lines 'label index:value",
        ),
        (
            "".join(f"{i % 2} 1000000000:1\n" for i in range(16)),
            r"got 16 examples of 1000000000 features, 119.2 GiB as a dense table, expected",
        ),
        (
            "".join(f"{i}.5 1:1\n" for i in range(16)),
            "targets: got 16 values for 16 examples, expected a few classes",
        ),
    ],
    ids=["format", "size", "targets"],
)
def test_a_file_that_cannot_be_used_is_refused(tiny, text, message):
    tiny.write_text(text)
    with pytest.raises(ValueError, match=message):
        svmlight(tiny)


def test_a_folder_of_texts_is_read(news):
    examples = newsgroups(news, 4)
    assert examples.inputs.shape == (12, 4)
    assert examples.inputs.dtype == torch.float64
    assert examples.counts() == [6, 6]
    assert examples.inputs.norm(dim=1).tolist() == pytest.approx([1] * 12)


def test_texts_are_not_standardised(news):
    parts = Regularization(newsgroups=news, device="cpu").split_data("news", 0)
    assert float(parts[0].inputs.min()) == 0


def test_a_folder_without_folders_is_refused(news):
    message = r"--newsgroups: got .*cats, expected a folder with a folder of texts"
    with pytest.raises(FileNotFoundError, match=message):
        newsgroups(news / "cats", 4)


@pytest.mark.parametrize("option", ["libsvm", "newsgroups"])
def test_a_missing_file_is_refused(tmp_path, option):
    experiment = Regularization(**{option: tmp_path / "none"})
    with pytest.raises(FileNotFoundError, match=rf"--{option}: found nothing at .*none"):
        experiment.check_options()
