"""Tables of features as labelled examples: scikit-learn's own, a file of libsvm, a folder of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import tasks

LARGEST = 2**31  # bytes of a dense table


def digits_or_cancer(name: str) -> tasks.Examples:
    """scikit-learn's sets of that name, shipped with it: inputs float64 `[n, features]`."""
    bunch = {"digits": "load_digits", "breast-cancer": "load_breast_cancer"}[name]
    found = getattr(_sklearn(name).datasets, bunch)()
    return _examples(found.data, found.target)


def svmlight(path: Path) -> tasks.Examples:
    """A file in the format of libsvm.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not in that format, or too large to be held densely.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--libsvm: found no file {path}; download one, and name it")
    try:
        inputs, targets = _sklearn(str(path)).datasets.load_svmlight_file(str(path))
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: got a file that cannot be read ({error}), expected lines 'label index:value …'"
        ) from error
    return _examples(_dense(inputs, path), targets)


def newsgroups(path: Path, features: int) -> tasks.Examples:
    """The tf-idf of texts, `path`/CLASS/TEXT, over the `features` most frequent words; in Latin 1, as 20 newsgroups is.

    Raises:
        FileNotFoundError: no folder, or fewer than two in it.
        ValueError: too large to be held densely; no word.
    """
    folders = [folder for folder in path.iterdir() if folder.is_dir()] if path.is_dir() else []
    if len(folders) < 2:
        raise FileNotFoundError(
            f"--newsgroups: got {path}, expected a folder with a folder of texts for each class"
        )
    sklearn = _sklearn(str(path))
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = sklearn.datasets.load_files(str(path), encoding="latin-1", shuffle=False)
    try:
        inputs = TfidfVectorizer(max_features=features).fit_transform(found.data)
    except ValueError as error:
        raise ValueError(f"{path}: got texts without a word ({error}), expected some") from error
    return _examples(_dense(inputs, path), found.target)


def split(whole: tasks.Examples, seed: int, scale: bool = True) -> tuple[tasks.Examples, ...]:
    """Half for training, a quarter each for validation and test, at random; features standardised on the first.

    A feature of one value in training is left out; without `scale` they all stay as they are.
    """
    order = torch.from_numpy(tasks.examples.random_stream(seed, "split").permutation(len(whole)))
    n = len(whole)
    parts = [
        whole.take(index)
        for index in (order[: n // 2], order[n // 2 : n * 3 // 4], order[n * 3 // 4 :])
    ]
    if not scale:
        return tuple(parts)
    mean, std = parts[0].inputs.mean(0), parts[0].inputs.std(0, correction=0)
    kept = std > 0
    return tuple(
        tasks.Examples((p.inputs[:, kept] - mean[kept]) / std[kept], p.targets) for p in parts
    )


def _examples(inputs: Any, targets: Any) -> tasks.Examples:
    classes, numbers = np.unique(targets, return_inverse=True)
    if len(classes) < 2 or len(classes) * 4 > len(numbers):
        raise ValueError(
            f"targets: got {len(classes)} values for {len(numbers)} examples, expected a few classes"
        )
    return tasks.Examples(
        torch.as_tensor(np.asarray(inputs, dtype=np.float64)), torch.as_tensor(numbers)
    )


def _dense(inputs: Any, path: Path) -> Any:
    size = 8 * inputs.shape[0] * inputs.shape[1]
    if size > LARGEST:
        raise ValueError(
            f"{path}: got {inputs.shape[0]} examples of {inputs.shape[1]} features, {size / 2**30:.1f} GiB as a dense "
            f"table, expected at most {LARGEST / 2**30:.1f}; give a part of the file, or fewer --features"
        )
    return inputs.toarray()


def _sklearn(what: str) -> Any:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ImportError(
            f'{what}: found no scikit-learn ({error}); pip install -e ".[tune]"'
        ) from error
    return sklearn
