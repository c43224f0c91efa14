"""Functions that mix double precision with the narrower types of tensors that they hold."""

import pytest
import torch
import torch.nn.functional as F
from oracles import randn

from metaimplicit.mixed_types import takes_mixed_types

Z = randn(4, 3, seed=0)
LABELS = torch.tensor([0, 2, 1, 2])
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0])
MATRIX = randn(3, 3, seed=1).float()

FUNCTIONS = {
    "cross-entropy": lambda z, cast: F.cross_entropy(z, LABELS, weight=cast(CLASS_WEIGHTS)),
    "nll": lambda z, cast: F.nll_loss(z.log_softmax(-1), LABELS, cast(CLASS_WEIGHTS)),
    "product": lambda z, cast: (z @ cast(MATRIX)).square().mean(),
    "linear": lambda z, cast: F.linear(z, cast(MATRIX), bias=cast(CLASS_WEIGHTS)).exp().mean(),
    "einsum": lambda z, cast: torch.einsum("ij,jk,ik->", z, cast(MATRIX), z),
}


@pytest.mark.parametrize("lift", [lambda f: f, torch.func.grad, torch.func.hessian])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_result_is_that_of_tensors_in_double_precision(kind, lift):
    function = FUNCTIONS[kind]
    with pytest.raises(RuntimeError, match="type"):
        function(Z, lambda x: x)
    found = lift(takes_mixed_types(lambda z: function(z, lambda x: x)))
    expected = lift(lambda z: function(z, torch.Tensor.double))
    batch = torch.stack([Z, 2 * Z])
    torch.testing.assert_close(found(Z), expected(Z), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        torch.vmap(found)(batch),
        torch.vmap(expected)(batch),
        rtol=1e-14,
        atol=1e-14,
    )


def test_a_tensor_that_is_written_to_is_not_replaced():
    held = torch.zeros(4, 3)
    index = torch.arange(4)
    with pytest.raises(RuntimeError, match="type"):
        takes_mixed_types(lambda z: held.index_add_(0, index, z))(Z)
    with pytest.raises(RuntimeError, match="type"):
        takes_mixed_types(lambda z: torch.matmul(z, MATRIX, out=held))(Z)
    assert not held.any()

    def add_and_assign(z):
        nonlocal held
        held += z
        held[0] = z[1]

    takes_mixed_types(add_and_assign)(Z)
    assert torch.equal(held, Z[[1, 1, 2, 3]].float())


def test_other_errors_are_those_of_torch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        takes_mixed_types(lambda z: z @ z)(Z)
