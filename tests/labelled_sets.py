"""Labelled sets whose inputs identify their examples, and the functions that draw from them."""

import numpy as np
import torch

import tasks

# Each draws subsets, or flawed copies, of a labelled set by a seed.
DRAWS = {
    "long_tailed": lambda examples, seed: [tasks.long_tailed(examples, 10, seed)],
    "per_class": lambda examples, seed: [*tasks.per_class(examples, 7, seed)],
    "corrupt_labels": lambda examples, seed: [tasks.corrupt_labels(examples, 0.3, seed)[0]],
}


def numbered(*counts):
    """`counts[c]` examples of class c in a random order. The input of an example is its number."""
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = np.random.default_rng(1).permutation(len(targets))
    inputs = torch.arange(len(targets)).view(-1, 1)
    return tasks.Examples(inputs, targets[torch.from_numpy(order)])


def numbers(examples):
    """The numbers of examples that come from `numbered`."""
    return examples.inputs[:, 0].tolist()


def is_same_set(one, other):
    """Whether two labelled sets are equal to the bit."""
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
