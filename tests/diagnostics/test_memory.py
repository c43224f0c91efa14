"""`LiveBytes` counts to the byte, and what it says of streamed Nyström."""

import pytest
import torch
import torch.nn.functional as F
from oracles import generator

from metaimplicit import Nystrom
from metaimplicit.diagnostics import LiveBytes
from metaimplicit.operators import Hessian


def test_the_peak_is_that_of_the_tensors_that_live_at_once():
    with LiveBytes() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del a
        b += 1
        view = b[:10]
        c = b * 2
        del b, view
        d = c.clone()
        torch.zeros(500)
        del c, d
    # At the peak, c, d and the zeros live.
    assert memory.peak == 2 * 4000 + 2000


def test_views_and_operations_in_place_take_no_memory():
    outside = torch.zeros(1000)
    with LiveBytes() as memory:
        outside += 1
        outside[:10].mul_(2)
    assert memory.peak == 0


def test_a_tensor_that_grows_takes_what_it_has_grown_to():
    with LiveBytes() as memory:
        out = torch.zeros(0)
        torch.add(torch.zeros(1), torch.zeros(1000), out=out)
    assert memory.peak == 4 + 4000 + 4000


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_a_sparse_tensor_takes_what_its_parts_take(layout):
    matrix = torch.eye(50).to_sparse(layout=layout)
    with LiveBytes() as memory:
        doubled = 2 * matrix
    values = doubled.to_sparse_coo().coalesce().values()
    assert values.nbytes <= memory.peak <= 3 * 8 * 51 + values.nbytes


def test_the_backward_pass_is_counted():
    matrix = torch.randn(50, 50, requires_grad=True)
    with LiveBytes() as memory:
        torch.autograd.grad((matrix @ matrix).sum(), matrix)
    assert 3 * 10_000 <= memory.peak <= 4 * 10_000 + 100


@pytest.mark.slow
@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
def test_nystrom_in_chunks_of_one_adds_at_most_four_vectors_to_a_product(sketch):
    """The peaks are in vectors of the 7,918 parameters of a network."""
    inputs = torch.rand(80, 60, generator=generator(0))
    labels = torch.arange(80) % 18
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(60, 100), torch.nn.Tanh(), torch.nn.Linear(100, 18))
    params = {name: p.detach().unsqueeze(0) for name, p in model.named_parameters()}

    def loss(stacked):
        single = {name: p.squeeze(0) for name, p in stacked.items()}
        outputs = torch.func.functional_call(model, single, (inputs,))
        return F.cross_entropy(outputs, labels).unsqueeze(0)

    operator = Hessian(loss, params)
    n = operator.shape[1]
    b = torch.randn(1, n, generator=generator(1))

    def peak(run):
        with LiveBytes() as memory:
            run()
        return memory.peak / (4 * n)

    streamed = Nystrom(rank=10, rho=1.0, sketch=sketch, chunk=1, generator=generator(2))
    whole = Nystrom(rank=10, rho=1.0, sketch=sketch)
    product = peak(lambda: operator.matvec(b))
    assert peak(lambda: streamed.solve(operator, b)) < product + 4
    assert peak(lambda: whole.solve(operator, b)) > product + 10
