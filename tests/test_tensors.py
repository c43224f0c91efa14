"""The tensors of a pytree are those that torch finds in it."""

from collections import OrderedDict, deque
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from metaimplicit.tensors import tensors_in


class Pair(NamedTuple):
    inputs: object
    targets: object


def tensor(number):
    return torch.full((2,), float(number))


TREES = {
    "tensor": tensor(0),
    "parameter": nn.Parameter(tensor(0)),
    "nothing": None,
    "number": 3,
    "dict": {"b": tensor(0), "a": [tensor(1), "text"]},
    "tuples in lists": [(tensor(0), (tensor(1),)), [], tensor(2)],
    "named tuples": Pair({"x": tensor(0)}, Pair(tensor(1), None)),
    "ordered dict": OrderedDict(b=tensor(0), a=tensor(1)),
    "deque": deque([tensor(0), {"x": tensor(1)}]),
    "shape": torch.Size([2, 3]),
    "result of torch": torch.max(torch.stack([tensor(0), tensor(1)]), dim=0),
}


@pytest.mark.parametrize("name", TREES)
def test_they_are_those_of_torch_in_its_order(name):
    expected = [x for x in tree_leaves(TREES[name]) if isinstance(x, torch.Tensor)]
    found = tensors_in(TREES[name])
    assert [id(x) for x in found] == [id(x) for x in expected]
