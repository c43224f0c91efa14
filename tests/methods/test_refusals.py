"""What cannot be asked, and what each error says."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tanh_network import DATA, GAUSS_NEWTON, INITIAL, XQ, YQ, X, Y, forward, network, outer
from torch import nn

from metaimplicit import (
    BilevelProblem,
    Dense,
    FromMeta,
    GradientDescent,
    Implicit,
    Proximal,
    Stream,
    Truncated,
    Unrolled,
    hypergradient,
)

ASK = partial(hypergradient, data=DATA, inner=GradientDescent(steps=3, lr=0.1), batched=True)


@pytest.mark.parametrize("method", [GAUSS_NEWTON, "first-order", "reptile", Truncated(0)], ids=str)
def test_a_step_size_is_refused_where_it_has_no_gradient(method):
    meta = INITIAL | {"lr": torch.tensor(0.1, dtype=torch.float64)}
    with pytest.raises(
        ValueError, match=r"cannot give the gradient of meta\['lr'\].*(unrolled|implicit)"
    ):
        ASK(
            network(Proximal(0.1)),
            meta,
            inner=GradientDescent(steps=3, lr=FromMeta("lr")),
            method=method,
        )


def test_a_regulariser_is_refused_by_first_order():
    meta = INITIAL | {"proximal": torch.tensor(0.1, dtype=torch.float64)}
    with pytest.raises(
        ValueError, match=r"first-order cannot give the gradient of meta\['proximal'\]"
    ):
        ASK(network(Proximal(FromMeta("proximal"))), meta, method="first-order")


def test_an_initialisation_the_inner_loss_does_not_read_is_refused_by_implicit():
    refused = pytest.raises(
        ValueError, match=r"implicit cannot give the gradient of meta\['0.weight'\].*proximal term"
    )
    with (
        pytest.warns(RuntimeWarning, match="NEGATIVE_CURVATURE"),
        refused,
    ):  # without a penalty A is singular, too
        ASK(network(), INITIAL, method=GAUSS_NEWTON)


def test_what_nothing_reads_has_gradient_zero():
    meta = INITIAL | {"unused": torch.ones(3).double(), "steps": torch.tensor(3)}
    result = ASK(network(Proximal(0.1)), meta, method=GAUSS_NEWTON)
    assert torch.equal(result.grads["unused"], torch.zeros(3).double())
    assert result.grads["steps"] == 0


def test_captured_tensors_are_named():
    secret = torch.ones(1).double().requires_grad_()
    module = nn.Linear(2, 1).double()

    def inner_loss(params, meta, data):
        return F.mse_loss(forward(params, data[0]) * secret, data[1])

    def through_a_module(params, meta, data):
        return F.mse_loss(forward(params, data[0]) + module(data[0]), data[1])

    for function, name in (
        (inner_loss, "tensor 'secret'"),
        (through_a_module, r"parameter 'module\.(weight|bias)'"),
    ):
        with pytest.raises(ValueError, match=rf"{name} requires grad and is captured"):
            ASK(BilevelProblem(network().init, function, outer), INITIAL, method="unrolled")
        with pytest.raises(ValueError, match="requires grad and is captured by a loss"):
            ASK(
                BilevelProblem(network().init, network().inner_loss, function),
                INITIAL,
                method="first-order",
            )


def test_losses_must_be_scalars():
    with pytest.raises(
        ValueError, match=r"inner_loss: got shape \(6, 1\) per task, expected a scalar"
    ):
        ASK(
            BilevelProblem(network().init, lambda p, m, d: forward(p, d[0]), outer),
            INITIAL,
            method="unrolled",
        )
    with pytest.raises(ValueError, match=r"outer_loss: got float per task"):
        ASK(
            BilevelProblem(network().init, network().inner_loss, lambda p, m, d: 1.0),
            INITIAL,
            method="unrolled",
            batched=False,
        )


def test_bad_arguments_are_refused():
    ok = network(Proximal(0.1))
    cases = [
        (
            {"method": "sgd"},
            "method: got 'sgd', expected one of unrolled, truncated, forward, real-time, first-order",
        ),
        ({"method": Truncated(4)}, "Truncated steps: got 4, expected at most 3"),
        (
            {"method": Truncated(1), "inner": GradientDescent(steps=3, tol=0.1)},
            "Truncated: got an inner loop with tol=0.1",
        ),
        ({"vectorize": "auto"}, "vectorize: got 'auto'"),
        ({"data": (X, Y[:2], XQ, YQ)}, "expected every tensor to carry one task axis"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            ASK(ok, INITIAL, **({"method": "unrolled"} | change))
    with pytest.raises(ValueError, match="meta: got dict"):
        ASK(ok, {}, method="cg")
    with pytest.raises(ValueError, match="expected a non-empty dict of floating-point tensors"):
        ASK(BilevelProblem(lambda m, d: {}, ok.inner_loss, outer), INITIAL, method="cg")
    with pytest.raises(ValueError, match="FromMeta\\('nowhere'\\): meta has no such entry"):
        ASK(ok, INITIAL, method="unrolled", inner=GradientDescent(lr=FromMeta("nowhere")))
    plain = BilevelProblem(ok.init, lambda p, m, d: ok.inner_loss(p, m, d), outer)
    with pytest.raises(ValueError, match="expected a Composite"):
        ASK(plain, INITIAL, method=Implicit(curvature="gauss-newton"))
    for make in (
        lambda: Truncated(-1),
        lambda: Implicit(curvature="fisher"),
        lambda: Implicit(damping=-1.0),
        lambda: Proximal(-1.0),
        lambda: Proximal(1.0, center="mean"),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_a_captured_start_or_number_is_named_too():
    secret = torch.ones(1, dtype=torch.float64, requires_grad=True)
    shifted = BilevelProblem(
        lambda m, d: {n: m[n] + secret for n in INITIAL}, network().inner_loss, outer
    )
    for method in ("unrolled", "first-order"):
        with pytest.raises(ValueError, match="tensor 'secret' requires grad and is captured"):
            ASK(shifted, INITIAL, method=method)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"lr: got a tensor that requires grad, expected FromMeta\('lr'\)"
    ):
        ASK(network(), INITIAL, inner=GradientDescent(lr=lr), method="unrolled")
    late = Stream(lambda t: DATA if t == 0 else (X * secret, Y, XQ, YQ))
    with pytest.raises(ValueError, match="requires grad and is captured"):
        ASK(network(), INITIAL, data=late, method="unrolled")


def test_more_that_is_refused():
    with pytest.raises(ValueError, match="data: got ndarray, which cannot be split by task"):
        ASK(network(), INITIAL, data=(X, Y.numpy(), XQ, YQ), method="unrolled")
    with pytest.raises(ValueError, match="Implicit batch: got one with data that is not a Stream"):
        ASK(network(Proximal(0.1)), INITIAL, method=Implicit(Dense(), batch=DATA))
    negative = INITIAL | {"proximal": torch.tensor(-0.5, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"proximal strength: got -0.5 from meta"):
        ASK(network(Proximal(FromMeta("proximal"))), negative, method=GAUSS_NEWTON)
    with pytest.raises(ValueError, match="Unrolled iterates: got an inner loop with tol"):
        ASK(network(), INITIAL, inner=GradientDescent(tol=0.1), method=Unrolled(iterates=True))
    both = BilevelProblem(
        network().init, network().inner_loss, lambda p, m, d: outer(p, m, d) + 1e-3 * m["lr"]
    )
    meta = INITIAL | {"lr": torch.tensor(0.1, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"first-order cannot give the gradient of meta\['lr'\]"):
        ASK(both, meta, inner=GradientDescent(steps=2, lr=FromMeta("lr")), method="first-order")
