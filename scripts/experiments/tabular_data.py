"""Labelled examples with features: scikit-learn's sets, a libsvm file, a folder of texts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tasks

# The sets that scikit-learn ships, and the functions that load them.
SCIKIT_LEARN_SETS = {"breast-cancer": "load_breast_cancer", "digits": "load_digits"}
MOST_BYTES = 2**31  # of a dense table


def scikit_learn_set(name: str) -> tasks.Examples:
    """A set of `SCIKIT_LEARN_SETS`, with inputs float64 `[n, features]`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    bunch = getattr(import_scikit_learn(name).datasets, SCIKIT_LEARN_SETS[name])()
    return to_examples(bunch.data, bunch.target)


def svmlight(path: Path) -> tasks.Examples:
    """The examples of a file in the format of libsvm, with inputs float64 `[n, features]`.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: scikit-learn is not installed.
        ValueError: The file is in another format, or too large for a dense table.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--libsvm: found no file {path}; download one, and name it")
    sklearn = import_scikit_learn(str(path))
    try:
        inputs, targets = sklearn.datasets.load_svmlight_file(str(path))
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: got a file that cannot be read ({error}), expected lines "
            "'label index:value …'"
        ) from error
    return to_examples(to_dense(inputs, path), targets)


def newsgroups(path: Path, features: int) -> tasks.Examples:
    """The tf-idf of texts at `path`/CLASS/TEXT over their most frequent words.

    Texts are read in Latin 1, which is the encoding of 20 newsgroups.

    Args:
        path: The folder of the classes' folders.
        features: Number of words.

    Returns:
        The texts, with inputs float64 `[n, features]`.

    Raises:
        FileNotFoundError: There are fewer than two folders in `path`.
        ImportError: scikit-learn is not installed.
        ValueError: The table is too large to be dense, or the texts have no word.
    """
    folders = [folder for folder in path.iterdir() if folder.is_dir()] if path.is_dir() else []
    if len(folders) < 2:
        raise FileNotFoundError(
            f"--newsgroups: got {path}, expected a folder with a folder of texts for each class"
        )
    sklearn = import_scikit_learn(str(path))
    from sklearn.feature_extraction.text import TfidfVectorizer

    files = sklearn.datasets.load_files(str(path), encoding="latin-1", shuffle=False)
    try:
        inputs = TfidfVectorizer(max_features=features).fit_transform(files.data)
    except ValueError as error:
        raise ValueError(f"{path}: got texts without a word ({error}), expected some") from error
    return to_examples(to_dense(inputs, path), files.target)


def digest_of_files(path: Path) -> str:
    """16 hexadecimal digits that identify a file, or the files in a folder and their names."""
    content = hashlib.sha256()
    files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.is_file())
    for file in files:
        name = file.relative_to(path).as_posix()
        content.update(f"{name} {file.stat().st_size}\n".encode(errors="surrogatepass"))
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def split(whole: tasks.Examples, seed: int, scale: bool = True) -> tuple[tasks.Examples, ...]:
    """Random halves: one for training, one for validation and test in equal parts.

    With `scale`, features have mean 0 and deviation 1 in the training part, and features that are
    constant there are left out.

    Example:
        >>> whole = tasks.Examples(torch.arange(8.0)[:, None], torch.arange(8) % 2)
        >>> [len(part) for part in split(whole, seed=0)]
        [4, 2, 2]
    """
    n = len(whole)
    random = tasks.examples.random_stream(seed, "split")
    order = torch.from_numpy(random.permutation(n))
    half, three_quarters = n // 2, n * 3 // 4
    indices = (order[:half], order[half:three_quarters], order[three_quarters:])
    parts = [whole.take(index) for index in indices]
    if not scale:
        return tuple(parts)

    mean = parts[0].inputs.mean(0)
    std = parts[0].inputs.std(0, correction=0)
    varies = std > 0
    return tuple(
        tasks.Examples((part.inputs[:, varies] - mean[varies]) / std[varies], part.targets)
        for part in parts
    )


def to_examples(inputs: Any, targets: Any) -> tasks.Examples:
    """Examples with inputs float64 and targets numbered from 0.

    Raises:
        ValueError: The targets have one value only, or too many to be classes.
    """
    values, numbers = np.unique(targets, return_inverse=True)
    if len(values) < 2 or len(values) * 4 > len(numbers):
        raise ValueError(
            f"targets: got {len(values)} values for {len(numbers)} examples, expected a few classes"
        )
    table = torch.as_tensor(np.asarray(inputs, dtype=np.float64))
    return tasks.Examples(table, torch.as_tensor(numbers))


def to_dense(inputs: Any, path: Path) -> Any:
    """A sparse matrix as an array. ValueError if it is too large."""
    n, features = inputs.shape
    size = 8 * n * features
    if size > MOST_BYTES:
        raise ValueError(
            f"{path}: got {n} examples of {features} features, {size / 2**30:.1f} GiB as a dense "
            f"table, expected at most {MOST_BYTES / 2**30:.1f}; give a part of the file, or fewer "
            "--features"
        )
    return inputs.toarray()


def import_scikit_learn(purpose: str) -> Any:
    """The package sklearn. ImportError says what needs it."""
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ImportError(
            f'{purpose}: found no scikit-learn ({error}); pip install -e ".[tune]"'
        ) from error
    return sklearn
