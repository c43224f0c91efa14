"""Losses in slices of the examples give what the whole batch gives, to round-off."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import generator, largest_error, randn, relative_error
from torch import nn

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    Dense,
    FromMeta,
    GradientDescent,
    Implicit,
    Neumann,
    Nystrom,
    Proximal,
    Stream,
    TorchOptimizer,
    Tuner,
    argmin,
    hypergradient,
)
from metaimplicit.diagnostics import LiveBytes
from metaimplicit.inner import NewtonCG
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import SAMA
from metaimplicit.methods.base import vector_jacobian_product
from metaimplicit.methods.linearize import linearize
from metaimplicit.methods.microbatches import in_microbatches
from metaimplicit.methods.recompute import recomputed
from metaimplicit.operators import Fisher
from metaimplicit.params import leaves
from metaimplicit.tuning import ClassWeights, ExampleWeights, WeightDecay, tuning_problem

M, M_VAL, SIZE = 7, 5, 3  # slices of 3, 3 and 1 examples, and of 3 and 2
START = {"first": randn(3, 4, seed=0), "second": randn(4, seed=1)}
TRAIN = (randn(M, 3, seed=2), randn(M, seed=3), torch.arange(M))
VALIDATION = (randn(M_VAL, 3, seed=4), randn(M_VAL, seed=5))
META = {
    "log_decay": torch.tensor(0.2, dtype=torch.float64),
    "weights": 0.5 + randn(M, seed=6).square(),
}
INNER = GradientDescent(steps=4, lr=0.05)


def network(params, meta, data):
    return torch.tanh(data[0] @ params["first"]) @ params["second"]


def decay(params, meta):
    """A regulariser whose Hessian is no multiple of the identity."""
    return meta["log_decay"].exp() * sum(p.square().sum() + p.pow(4).sum() for p in params.values())


def plain_loss(params, meta, data):
    errors = (network(params, meta, data) - data[1]).square()
    return (meta["weights"][data[2]] * errors).mean() + decay(params, meta)


COMPOSITE = Composite(
    outputs=network,
    loss=lambda z, data: (z - data[1]).square(),
    penalty=decay,
    weights=lambda meta, losses, data: meta["weights"][data[2]],
)


def validation_loss(params, meta, data):
    return F.mse_loss(network(params, meta, data), data[1]) + meta["log_decay"].square()


def problem_of(inner_loss, outer_loss=validation_loss, start=START):
    return BilevelProblem(lambda meta, data: start, inner_loss, outer_loss)


STREAM = Stream(lambda t: TRAIN if t < INNER.steps else VALIDATION)


def run(method, inner_loss=plain_loss, outer_loss=validation_loss, **options):
    problem = options.pop("problem", None) or problem_of(inner_loss, outer_loss)
    options = {"meta": META, "data": STREAM, "inner": INNER} | options
    return hypergradient(problem, method=method, **options)


def assert_equal_results(sliced, whole, tolerance=1e-12):
    assert largest_error(sliced.grads, whole.grads) < tolerance
    assert largest_error(sliced.params, whole.params) < tolerance
    assert relative_error(sliced.outer_loss, whole.outer_loss) < tolerance
    assert sliced.report.products == whole.report.products
    assert torch.equal(sliced.report.status, whole.report.status)


# Values.

SOLVERS = {
    "cg": lambda: CG(max_steps=5),
    "neumann": lambda: Neumann(terms=4),
    "nystrom": lambda: Nystrom(rank=14, rho=3.0, generator=generator(0)),
    "dense": Dense,
}
LOSSES = {
    "plain": (plain_loss, "hessian"),
    "composite": (COMPOSITE, "hessian"),
    "gauss-newton": (COMPOSITE, "gauss-newton"),
}


@pytest.mark.parametrize(
    ("solver", "loss"),
    [
        *(("cg", loss) for loss in LOSSES),
        *(("neumann", "plain"), ("nystrom", "gauss-newton"), ("dense", "composite")),
    ],
)
def test_a_hypergradient_is_that_of_the_whole_batch(solver, loss):
    inner_loss, curvature = LOSSES[loss]
    solver = SOLVERS[solver]
    method = partial(Implicit, curvature=curvature, batch=TRAIN, check_curvature=True)
    whole = run(method(solver()), inner_loss)
    sliced = run(method(solver(), microbatch=SIZE), inner_loss)
    assert_equal_results(sliced, whole)
    residuals = [result.report.hessian_residual for result in (sliced, whole)]
    assert torch.allclose(*residuals, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("inner_loss", "curvature"), LOSSES.values(), ids=LOSSES)
def test_products_and_the_mixed_term_are_those_of_the_whole_batch(inner_loss, curvature):
    problem = problem_of(inner_loss)
    theta = {name: p.unsqueeze(0) for name, p in START.items()}
    u = {name: randn(*p.shape, seed=7) for name, p in theta.items()}
    vectors = randn(3, 1, 16, seed=8)

    def evaluate(problem):
        lifted = LiftedProblem(problem, TRAIN, batched=False)
        phi = leaves(META)
        point = linearize(lifted, theta, phi, TRAIN, curvature=curvature)
        results = {f"gradient {name}": g.detach() for name, g in point.gradient.items()}
        results["product"] = point.core.matvec(vectors[0])
        results["products"] = point.core.matmat(vectors)
        results["columns"] = point.core.columns(torch.tensor([2, 14]))
        results |= vector_jacobian_product(point.gradient, phi, u)
        return results

    whole = evaluate(problem)
    assert largest_error(evaluate(in_microbatches(problem, SIZE, batched=False)), whole) < 1e-12
    assert whole["weights"].norm() > 0.1


@pytest.mark.parametrize(
    "method", [SAMA(batch=TRAIN), Implicit(products="finite-differences", batch=TRAIN)]
)
def test_methods_of_first_derivatives_take_microbatches(method):
    sliced = type(method)(**vars(method) | {"microbatch": SIZE})
    # Differences amplify round-off.
    assert largest_error(run(sliced).grads, run(method).grads) < 1e-8


def test_a_newton_loop_takes_microbatches():
    method = partial(Implicit, CG(max_steps=20), batch=TRAIN)
    inner = NewtonCG(steps=4)
    options = {"inner_loss": COMPOSITE, "inner": inner}
    assert_equal_results(run(method(microbatch=SIZE), **options), run(method(), **options), 1e-10)


def test_a_batch_of_one_slice_is_the_whole_batch_to_the_bit():
    whole = run(Implicit(batch=TRAIN))
    sliced = run(Implicit(batch=TRAIN, microbatch=M))
    assert all(torch.equal(sliced.grads[name], whole.grads[name]) for name in META)


def test_tensors_of_the_data_have_the_gradients_of_the_whole_batch():
    x = TRAIN[0].clone().requires_grad_()
    data = (x, *TRAIN[1:])
    options = {"outer_loss": plain_loss, "data": data}
    whole = run(Implicit(), **options)
    sliced = run(Implicit(microbatch=SIZE), **options)
    assert relative_error(sliced.data_grads[0], whole.data_grads[0]) < 1e-12


def test_the_derivative_of_a_derivative_of_argmin_is_that_of_the_whole_batch():
    def second_derivatives(microbatch):
        # With less decay, the minimum is not at zero.
        values = META | {"log_decay": META["log_decay"] - 3}
        phi = {name: m.clone().requires_grad_() for name, m in values.items()}
        params = argmin(
            COMPOSITE,
            lambda meta, data: START,
            phi,
            TRAIN,
            inner=NewtonCG(steps=60, cg_steps=16, tol=1e-12),
            method=Implicit(Dense(), microbatch=microbatch),
        )
        total = sum(p.pow(3).sum() for p in params.values())
        (first,) = torch.autograd.grad(total, phi["log_decay"], create_graph=True)
        return torch.autograd.grad(first, list(phi.values()))

    pairs = zip(second_derivatives(SIZE), second_derivatives(None), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) < 1e-10


def test_a_node_has_derivatives_of_every_order_in_what_it_reads_alone():
    x, y, unread = (randn(3, seed=seed).requires_grad_() for seed in range(3))

    def function(tensors):
        return [(tensors[0].sin() * tensors[1].pow(3)).sum(), "a constant", tensors[1].exp()]

    def third_order(values):
        gradients = [values[0] + values[2].prod()]
        for _ in range(3):
            total = sum((g * g).sum() for g in gradients)
            gradients = torch.autograd.grad(total, [x, y], create_graph=True)
        return [g.detach() for g in gradients]

    values = recomputed(function, [x, y, unread])
    pairs = zip(third_order(values), third_order(function([x, y])), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) < 1e-12
    assert torch.autograd.grad(values[0], [x, unread], allow_unused=True)[1] is None


# What the losses read.


def test_parameters_that_the_loss_does_not_read_stay_where_they_are():
    start = START | {"idle": randn(2, seed=9)}
    inner = TorchOptimizer(torch.optim.SGD, steps=4, lr=0.05, weight_decay=0.3)

    def outer_loss(params, meta, data):
        return validation_loss(params, meta, data) + params["idle"].square().sum()

    def inner_loss(params, meta, data):
        return plain_loss({name: params[name] for name in START}, meta, data)

    problem = problem_of(inner_loss, outer_loss, start)
    whole = run(Implicit(batch=TRAIN), problem=problem, inner=inner)
    sliced = run(Implicit(batch=TRAIN, microbatch=SIZE), problem=problem, inner=inner)
    assert_equal_results(sliced, whole)
    assert torch.equal(sliced.params["idle"], start["idle"])
    norms = [result.report.inner_gradient_norm for result in (sliced, whole)]
    assert relative_error(*norms) < 1e-12


def test_a_captured_tensor_is_named():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def inner_loss(params, meta, data):
        return scale * plain_loss(params, meta, data)

    with pytest.raises(ValueError, match=r"tensor 'scale' requires grad and is captured"):
        run(Implicit(batch=TRAIN, microbatch=SIZE), inner_loss)


# Tuning.


@pytest.mark.parametrize("variable", [ExampleWeights(40), ClassWeights(3)])
def test_a_tuner_takes_the_steps_of_the_whole_batches(variable):
    """With weights of classes and ignored labels, no loss is a mean over the examples."""
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weight)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    tuning = tuning_problem(model, loss, [variable, WeightDecay(start=0.1)])

    def batch(number):
        m = 6 + number % 3
        targets = torch.arange(number, number + m) % 3
        targets[1] = -100
        return randn(m, 4, seed=number), targets, torch.arange(m) + number

    def tuned(microbatch):
        tuner = Tuner(
            tuning.problem,
            tuning.meta,
            inner=GradientDescent(steps=2, lr=0.1),
            method=Implicit(CG(), microbatch=microbatch),
            domains=tuning.domains,
            optimizer=partial(torch.optim.SGD, lr=0.5),
        )
        tuner.fit(batch, lambda number: batch(number + 20), steps=3)
        return tuner.meta | tuner.params

    whole = tuned(None)
    assert largest_error(tuned(4), whole) < 1e-12
    assert relative_error(whole["weight_decay"], tuning.meta["weight_decay"]) > 1e-6


# Refusals.

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
ZEROS = {"w": torch.zeros(3, 3, dtype=torch.float64)}


def logits(params, meta, data):
    return data[0] @ params["w"]


NOT_MEANS = {
    "sum": lambda z, y: F.mse_loss(z, y, reduction="sum"),
    "ranking": lambda z, y: F.relu((z[:, None] - z) * (y - y[:, None]).sign()).mean(),
    "batch statistics": lambda z, y: (z - z.mean() - y).square().mean(),
}


@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("function", NOT_MEANS.values(), ids=NOT_MEANS)
def test_a_plain_loss_that_is_no_mean_is_refused(function, where):
    def loss(params, meta, data):
        return function(network(params, meta, data), data[1])

    message = rf"microbatch: the {where} loss of [56] examples is not the mean of those of"
    with pytest.raises(ValueError, match=message):
        run(Implicit(batch=TRAIN, microbatch=SIZE), **{f"{where}_loss": loss})


def test_weights_of_classes_are_refused_though_all_losses_are_equal_at_the_start():
    problem = BilevelProblem(
        init=lambda meta, data: ZEROS,
        inner_loss=lambda p, m, d: F.cross_entropy(logits(p, m, d), d[1], CLASS_WEIGHTS),
        outer_loss=validation_loss,
    )
    with pytest.raises(ValueError, match=r"inner loss of 6 examples .* expected a mean over"):
        run(Implicit(microbatch=SIZE), problem=problem, data=(TRAIN[0], LABELS))


def test_another_mode_of_the_model_is_looked_at_again():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    start = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(params, meta, data):
        return torch.func.functional_call(model, params, (data[0],)).squeeze(1)

    fit = Composite(outputs, loss=lambda z, d: F.mse_loss(z, d[1]))
    problem = BilevelProblem(
        init=lambda meta, data: start, inner_loss=fit, outer_loss=validation_loss
    )
    sliced = in_microbatches(problem, SIZE, batched=False)
    model.eval()
    torch.testing.assert_close(
        sliced.inner_loss(start, META, TRAIN), fit(start, META, TRAIN), rtol=1e-12, atol=0
    )
    model.train()
    with pytest.raises(ValueError, match="outputs of the inner loss at 6 examples are not those"):
        sliced.inner_loss(start, META, TRAIN)


def test_labels_that_come_to_be_masked_are_looked_at_again():
    def loss(params, meta, data):
        return F.cross_entropy(logits(params, meta, data), data[1])

    problem = BilevelProblem(
        init=lambda meta, data: ZEROS, inner_loss=loss, outer_loss=validation_loss
    )
    sliced = in_microbatches(problem, SIZE, batched=False)
    params = {"w": randn(3, 3, seed=1)}
    torch.testing.assert_close(
        sliced.inner_loss(params, META, (TRAIN[0], LABELS)), loss(params, META, (TRAIN[0], LABELS))
    )
    masked = LABELS.clone()
    masked[6] = -100  # few of the examples are looked at, and this one would not be among them
    with pytest.raises(ValueError, match="is not the mean of those of 2 and 4"):
        sliced.inner_loss(params, META, (TRAIN[0], masked))


@pytest.mark.parametrize("masked", [1, 4, 20, 39])
@pytest.mark.parametrize("size", [1, 2, 8, 33])
def test_a_loss_that_leaves_labels_out_is_refused(masked, size):
    x = randn(40, 3, seed=1)
    labels = torch.arange(40) % 3
    labels[torch.arange(masked) * 7 % 40] = -100

    def loss(params, meta, data):
        return F.cross_entropy(logits(params, meta, data), data[1])

    problem = BilevelProblem(lambda meta, data: ZEROS, loss, validation_loss)
    sliced = in_microbatches(problem, size, batched=False)
    with pytest.raises(ValueError, match="is not the mean of those of"):
        sliced.inner_loss({"w": randn(3, 3, seed=1)}, META, (x, labels))


def test_a_mean_over_places_of_which_some_are_masked_is_refused():
    """An example with one masked place weighs less than the others in a mean over places."""
    x = randn(12, 4, 3, seed=1)
    labels = torch.arange(48).reshape(12, 4) % 3
    labels[7, 1] = -100

    def loss(params, meta, data):
        return F.cross_entropy((data[0] @ params["w"]).flatten(0, 1), data[1].flatten())

    problem = BilevelProblem(lambda meta, data: ZEROS, loss, validation_loss)
    sliced = in_microbatches(problem, 2, batched=False)
    with pytest.raises(ValueError, match="is not the mean of those of"):
        sliced.inner_loss({"w": randn(3, 3, seed=1)}, META, (x, labels))


def test_unsigned_numbers_are_no_labels():
    x = randn(M, 3, seed=1)
    numbers = torch.arange(M).to(torch.uint16)
    problem = BilevelProblem(
        init=lambda meta, data: ZEROS,
        inner_loss=lambda p, m, d: (d[0] @ p["w"]).square().mean(),
        outer_loss=validation_loss,
    )
    sliced = in_microbatches(problem, SIZE, batched=False)
    params = {"w": randn(3, 3, seed=1)}
    expected = problem.inner_loss(params, META, (x, numbers))
    torch.testing.assert_close(sliced.inner_loss(params, META, (x, numbers)), expected)


def assert_equal_in_microbatches(outputs, loss):
    """With a ridge penalty, the hypergradient is that of the whole batch."""
    fit = Composite(outputs, loss=loss, penalty=Proximal(FromMeta("strength"), center="zero"))
    problem = BilevelProblem(lambda meta, data: {"w": randn(3, 3, seed=1)}, fit, fit)
    meta = {"strength": torch.tensor(1.0, dtype=torch.float64)}
    options = {"problem": problem, "data": (TRAIN[0], LABELS), "meta": meta}
    method = partial(Implicit, CG(max_steps=9))
    assert_equal_results(run(method(microbatch=SIZE), **options), run(method(), **options), 1e-10)


def test_a_composite_may_have_any_loss_of_the_outputs():
    def loss(z, data):
        return F.cross_entropy(z, data[1], CLASS_WEIGHTS, reduction="sum") + z.std()

    assert_equal_in_microbatches(logits, loss)


def test_outputs_that_are_all_zero_are_those_of_slices():
    """As those of a linear model at its start."""
    fit = Composite(lambda params, meta, data: data[0] @ params["w"], loss=lambda z, d: z.sum())
    sliced = in_microbatches(BilevelProblem(lambda m, d: ZEROS, fit, fit), SIZE, batched=False)
    outputs = sliced.inner_loss.outputs(ZEROS, META, TRAIN)
    assert torch.equal(outputs, fit.outputs(ZEROS, META, TRAIN))


def test_outputs_may_hold_integers_and_none():
    def outputs(params, meta, data):
        z = logits(params, meta, data)
        return z, z.argmax(1), None

    assert_equal_in_microbatches(
        outputs, lambda z, data: F.cross_entropy(z[0] + z[1][:, None], data[1])
    )


def test_a_model_that_mixes_examples_is_refused():
    def normalised(params, meta, data):
        z = network(params, meta, data)
        return (z - z.mean()) / z.std()

    mixing = Composite(normalised, loss=lambda z, d: F.mse_loss(z, d[1]))
    message = r"outputs of the inner loss at 6 examples are not those of 2 and 4 .* by itself"
    with pytest.raises(ValueError, match=message):
        run(Implicit(batch=TRAIN, microbatch=SIZE), mixing)


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_random_draws_are_refused(where):
    def loss(params, meta, data):
        return F.mse_loss(F.dropout(network(params, meta, data)), data[1])

    with pytest.raises(ValueError, match=rf"{where} loss: it draws random numbers"):
        run(Implicit(batch=TRAIN, microbatch=SIZE), **{f"{where}_loss": loss})


def test_an_operation_without_a_second_derivative_is_refused():
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.tanh())
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * (1 - ctx.saved_tensors[0].square())

    def inner_loss(params, meta, data):
        return Tanh.apply(network(params, meta, data)).square().mean()

    with pytest.raises(ValueError, match=r"whose backward is once_differentiable"):
        run(Implicit(batch=TRAIN, microbatch=SIZE), inner_loss)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((*TRAIN[:2], torch.arange(M - 1)), r"leading sizes \[6, 7\], expected one number of"),
        (TRAIN[:2], r"cannot be evaluated on a part of the examples \(.*carry the examples first"),
        ((TRAIN[0], SimpleNamespace(y=TRAIN[1])), r"got data with a SimpleNamespace, .* in dicts"),
    ],
)
def test_data_without_one_axis_of_examples_are_refused(data, message):
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(M, dtype=torch.float64)},
        inner_loss=lambda p, m, d: (d[0].sum(-1) @ p["w"]).sum(),
        outer_loss=lambda p, m, d: p["w"].sum(),
    )
    with pytest.raises(ValueError, match=rf"microbatch: .*{message}"):
        run(Implicit(microbatch=SIZE), problem=problem, data=data)


def test_an_end_of_the_memory_is_not_blamed_on_the_data():
    def inner_loss(params, meta, data):
        if len(data[0]) < M:
            raise torch.OutOfMemoryError
        return network(params, meta, data)[0].square().mean()

    with pytest.raises(torch.OutOfMemoryError):
        run(Implicit(microbatch=SIZE), inner_loss, data=TRAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatch": 0}, r"microbatch: got 0, expected at least 1 example"),
        ({"curvature": "kfac"}, r"microbatch: got curvature 'kfac', expected 'hessian' or"),
        ({"curvature": "diagonal"}, r"microbatch: got curvature 'diagonal'"),
        ({"curvature": Fisher}, r"microbatch: got curvature Fisher"),
        ({"preconditioner": "ekfac"}, r"microbatch: got a preconditioner"),
        ({"products": "forward-over-reverse"}, r"microbatch: got products='forward-over-reverse'"),
    ],
)
def test_options_that_allow_no_slices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Implicit(**{"microbatch": 2} | options)


def test_a_batch_of_tasks_is_refused():
    with pytest.raises(ValueError, match=r"microbatch: got batched=True, expected one problem"):
        run(Implicit(batch=TRAIN, microbatch=SIZE), batched=True)


def test_the_aux_of_an_outer_loss_is_refused():
    def outer_loss(params, meta, data):
        return validation_loss(params, meta, data), {"a": torch.ones(())}

    with pytest.raises(ValueError, match=r"returns a tuple, expected a scalar tensor alone"):
        run(Implicit(batch=TRAIN, microbatch=SIZE), outer_loss=outer_loss)


# Memory.


def peak_of_network(width, m, *, microbatch, curvature):
    """The peak of a hypergradient in bytes, and the bytes of the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    tuning = tuning_problem(model, nn.MSELoss(), [WeightDecay(start=0.1)])
    batch = (torch.randn(m, width, generator=generator(1)), torch.zeros(m, 1))
    method = Implicit(
        CG(max_steps=1), curvature=curvature, damping=1.0, batch=batch, microbatch=microbatch
    )
    inner = GradientDescent(steps=1, lr=0.1)
    data = Stream(lambda t: batch)
    with LiveBytes() as memory:
        hypergradient(tuning.problem, tuning.meta, data, inner=inner, method=method)
    return memory.peak, 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_memory_falls_as_the_slices_do(curvature):
    def peak(microbatch):
        bytes_, size = peak_of_network(32, 1024, microbatch=microbatch, curvature=curvature)
        return bytes_ - 8 * size  # the parameters and some vectors like them do not fall

    whole, eighth = (peak(size) for size in (None, 128))
    assert eighth < 0.17 * whole


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_memory_does_not_grow_with_the_number_of_slices(curvature):
    """Each of 4 slices has gradients as large as the parameters, of which few live at once."""
    whole, size = peak_of_network(64, 16, microbatch=None, curvature=curvature)
    sliced, _ = peak_of_network(64, 16, microbatch=4, curvature=curvature)
    assert sliced < whole + size
