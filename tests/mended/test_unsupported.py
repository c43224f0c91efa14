"""What torch cannot differentiate or vmap is refused by name, with what can be done instead."""

import pytest
import torch
from crossing import every_pair
from mended.models import Function, bag, episodes_for, linear, meta_of, words
from reported.helpers import INNER, cross_entropy, draw, refuses
from torch import nn
from torch.nn import functional as F

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    FirstOrder,
    Forward,
    Implicit,
    MetaLearner,
    Tuner,
    Unrolled,
    hypergradient,
    tuning_problem,
)
from metaimplicit.optim import NaturalGradient
from metaimplicit.training import to_device
from metaimplicit.tuning import WeightDecay
from metaimplicit.unsupported import UnsupportedOperationError, find_advice

ONCE = "first-order.*finite-differences"
REVERSE = "unrolled.*double-backward"
LOOP = "vectorize='loop'"


class Square(torch.autograd.Function):
    """A function as people wrote them before torch.func."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def grid(x):
    places = torch.linspace(-1, 1, 12).reshape(1, 1, 6, 2).expand(len(x), -1, -1, -1)
    return F.grid_sample(x[:, None, None], places, align_corners=False).flatten(1)


WITHOUT_TANGENT = {
    "huber_loss": (linear, lambda z, y: F.huber_loss(z.sum(-1), y.double()), "huber_loss"),
    "soft_margin_loss": (
        linear,
        lambda z, y: F.soft_margin_loss(z.sum(-1), 2 * (y > 2).double() - 1),
        "soft_margin_loss",
    ),
    "multi_margin_loss": (linear, F.multi_margin_loss, "multi_margin_loss"),
    "EmbeddingBag": (bag, F.cross_entropy, "embedding_bag"),
    "cdist": (lambda: linear(Function(lambda x: torch.cdist(x, x[:6]))), F.cross_entropy, "cdist"),
    "grid_sample": (lambda: linear(Function(grid)), F.cross_entropy, "grid_sampler_2d"),
    "autograd.Function": (
        lambda: linear(Function(Square.apply)),
        F.cross_entropy,
        "torch.autograd.Function",
    ),
    "checkpointing": (
        lambda: linear(
            Function(
                lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)
            )
        ),
        F.cross_entropy,
        r"checkpointing|torch\.autograd\.Function",  # which older versions make it by
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", WITHOUT_TANGENT)
def test_forward_mode_that_is_missing_is_refused_by_name(name):
    make, loss, operation = WITHOUT_TANGENT[name]
    model = make()
    with refuses(operation, REVERSE):
        learner = MetaLearner(model, loss, inner=INNER, method=Forward(), vectorize="loop")
        learner.backward(episodes_for(model))


WITHOUT_BATCHING_RULE = {
    "LSTM": (nn.LSTM, "lstm"),
    "GRU": (nn.GRU, "gru"),
    "RNN": (nn.RNN, "rnn_tanh"),
}
NOT_VMAPPED = {
    "a number": (lambda x: x * x.mean().item(), r"\.item\(\)"),
    "control flow": (lambda x: x * 2 if x.sum() > 0 else x, "data-dependent control flow"),
    "a mask": (lambda x: x * x[x > 0].mean(), "boolean mask"),
    "in place": (lambda x: torch.zeros(len(x), 6).add_(x), "in-place"),
    "numpy": (lambda x: x * float(x.detach().numpy().mean()), "memory of a tensor"),
    "autograd.Function": (Square.apply, "torch.autograd.Function"),
    "autograd.grad": (
        lambda x: torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0],
        r"torch\.func\.grad",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_BATCHING_RULE)
def test_vmap_that_is_asked_for_and_missing_is_refused_by_name(name):
    layer, operation = WITHOUT_BATCHING_RULE[name]

    class Recurrent(layer):
        def forward(self, x):
            return super().forward(x)[0]

    model = nn.Sequential(Recurrent(4, 6), nn.Linear(6, 5))
    with refuses(operation, LOOP):
        MetaLearner(model, F.cross_entropy, inner=INNER, vectorize="vmap").backward(draw(tasks=2))


@pytest.mark.parametrize("name", NOT_VMAPPED)
def test_code_that_cannot_be_vmapped_is_refused_with_the_reason(name):
    function, reason = NOT_VMAPPED[name]
    model = linear(Function(function))
    for method in (Unrolled(), FirstOrder()):
        learner = MetaLearner(model, F.cross_entropy, method=method, vectorize="vmap")
        with refuses(reason, LOOP):
            learner.backward(draw(tasks=2))
        with refuses(reason, LOOP):
            learner.adapt(draw(tasks=2).support, batched=True)


class UsersEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 6))

    def forward(self, x):
        return F.embedding(x, self.table, sparse=True)


SPARSE = {
    "Embedding": lambda: [nn.Embedding(9, 6, sparse=True), nn.Flatten(), nn.Linear(24, 5)],
    "EmbeddingBag": lambda: [nn.EmbeddingBag(9, 6, sparse=True), nn.Linear(6, 5)],
    "user's": lambda: [UsersEmbedding(), nn.Flatten(), nn.Linear(24, 5)],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("name", "vectorize", "method"),
    every_pair(SPARSE, ["auto", "loop", "vmap"], [Unrolled(), FirstOrder(), Implicit(CG())]),
    ids=str,
)
def test_sparse_gradients_are_refused(name, method, vectorize):
    model = nn.Sequential(*SPARSE[name]())
    options = {"inner": INNER, "method": method, "proximal": 1.0, "vectorize": vectorize}
    with refuses("Embedding", "sparse=False"):
        MetaLearner(model, F.cross_entropy, **options).backward(words())


@pytest.mark.parametrize("vectorize", ["auto", "loop", "vmap"])
def test_an_embedding_that_does_not_adapt_may_have_sparse_gradients(vectorize):
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 6, sparse=sparse)
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(24, 5))
        options = {"inner": INNER, "adapt": "2.*", "vectorize": vectorize}
        MetaLearner(model, F.cross_entropy, **options).backward(words())
        gradients.append(embedding.weight.grad)
    assert gradients[1].is_sparse
    torch.testing.assert_close(gradients[1].to_dense(), gradients[0])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_forward_mode_refuses_sparse_data():
    x = torch.eye(3).to_sparse_csr()
    problem = BilevelProblem(
        lambda meta, data: {"w": torch.zeros(3, 1)},
        lambda params, meta, data: (data @ params["w"] - meta["y"]).square().sum(),
        lambda params, meta, data: params["w"].sum(),
    )
    with pytest.raises(UnsupportedOperationError, match=r"^sparse tensors: .* dense tensors"):
        hypergradient(problem, {"y": torch.ones(3, 1)}, x, inner=INNER, method="forward")


def test_running_statistics_are_refused_in_forward_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

    def loss(params, meta, data):
        outputs = torch.func.functional_call(model, params, (data,))
        return (outputs + meta["shift"]).square().mean()

    start = {name: p.detach() for name, p in model.named_parameters()}
    problem = BilevelProblem(lambda meta, data: start, loss, loss)
    meta = {"shift": torch.tensor(1.0)}
    with refuses("buffer", r"model\.eval\(\), use track_running_stats=False", REVERSE):
        hypergradient(problem, meta, torch.randn(6, 4), inner=INNER, method="forward")


class UsersParallel(nn.DataParallel):
    pass


WRAPPED = {
    "DataParallel": (nn.DataParallel, ["DataParallel", r"\.module"]),
    "user's DataParallel": (UsersParallel, ["DataParallel", r"\.module"]),
    "script": (torch.jit.script, ["torch.jit", "before torch.jit"]),
    "trace": (lambda m: torch.jit.trace(m, torch.randn(3, 4)), ["torch.jit", "before torch.jit"]),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("method", [Unrolled(), FirstOrder()], ids=["unrolled", "first-order"])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_whose_parameters_cannot_be_replaced_is_refused(name, method):
    wrap, patterns = WRAPPED[name]
    model = wrap(nn.Linear(4, 5))
    with refuses(*patterns):
        MetaLearner(model, F.cross_entropy, method=method).backward(draw(tasks=2))
    problem = BilevelProblem(
        init=lambda meta, data: dict(meta),
        inner_loss=lambda params, meta, data: cross_entropy(model, params, data),
        outer_loss=lambda params, meta, data: cross_entropy(model, params, data),
    )
    with refuses(*patterns):
        hypergradient(
            problem, meta_of(model), draw(2).support, inner=INNER, method=method, batched=True
        )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.jit.script], ids=["parallel", "script"])
def test_a_part_that_is_wrapped_still_works(wrap):
    torch.manual_seed(0)
    inside = nn.Linear(6, 5)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of DataParallel
    wrapped = nn.Sequential(nn.Linear(4, 6), wrap(inside.to(device))).to(device)
    plain = nn.Sequential(wrapped[0], inside)
    episodes = to_device(draw(tasks=2), device)
    gradients = []
    for model in (wrapped, plain):
        model.zero_grad()
        options = {"inner": INNER, "vectorize": "loop", "adapt": "0.*"}
        MetaLearner(model, F.cross_entropy, **options).backward(episodes)
        gradients.append(model[0].weight.grad.clone())
    torch.testing.assert_close(*gradients)


def hypergradient_of(model):
    def loss(params, meta, data):
        outputs = torch.func.functional_call(model, params, (torch.ones(2, 4),))
        return outputs.square().mean()

    start = {name: p.detach() for name, p in model.named_parameters()}
    problem = BilevelProblem(lambda meta, data: dict(meta), loss, loss)
    result = hypergradient(problem, start, None, inner="gradient-descent", method="unrolled")
    return torch.cat([g.flatten() for g in result.grads.values()])


def test_a_model_that_averages_gradients_itself_is_refused(tmp_path):
    plain = nn.Linear(4, 5)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:

        class UsersDistributed(nn.parallel.DistributedDataParallel):
            pass

        for wrap in (nn.parallel.DistributedDataParallel, UsersDistributed):
            for model in (wrap(plain), nn.Sequential(wrap(plain))):
                with refuses("Distributed", r"\.module", "all_reduce"):
                    MetaLearner(model, F.cross_entropy)
                with refuses("Distributed", r"\.module", "all_reduce"):
                    tuning_problem(model, F.cross_entropy, [WeightDecay()])
                problem = BilevelProblem(
                    init=lambda meta, data: {},
                    inner_loss=Composite(outputs=None, loss=None, module=model),
                    outer_loss=lambda *_: None,
                )
                with refuses("Distributed", r"\.module", "all_reduce"):
                    Tuner(problem, {"lr": torch.tensor(0.1)}, inner=INNER)
                    NaturalGradient(model, F.cross_entropy)
                with refuses("Distributed", r"\.module", "all_reduce"):
                    hypergradient_of(model)
        # What is wrapped may be called, whether or not its wrapper is at hand.
        assert torch.equal(hypergradient_of(model[0].module), hypergradient_of(plain))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("message", "patterns"),
    [
        ("derivative for aten::_cudnn_rnn_backward is not implemented", ["cudnn.flags", ONCE]),
        ("the derivative for 'made_up_backward' is not implemented.", ["made_up", ONCE]),
        ("derivative for aten::made_up is not implemented", ["made_up: torch has no derivative"]),
        (
            "The function 'made_up' is not differentiable with respect to argument 'weight'.",
            ["'made_up'", "argument 'weight'", "reduction='none'"],
        ),
        ("Trying to use forward AD with _made_up that does not support it", ["made_up", REVERSE]),
        ("Batching rule not implemented for mine::made_up; the fallback", ["mine::made_up", LOOP]),
        ("vmap: we do not yet support aten::made_up. Please file", ["aten::made_up", LOOP]),
    ],
)
def test_the_advice_depends_on_the_message_alone(message, patterns):
    advice = find_advice(RuntimeError(message))
    with refuses(*patterns):
        raise ValueError(advice)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(4, 5).double(), torch.randn(2, 6, 4).float()),
        lambda: (
            nn.Sequential(nn.Conv1d(4, 5, 1), nn.Flatten()).float(),
            torch.randn(2, 6, 4, 1).double(),
        ),
    ],
)
def test_data_of_another_type_than_the_model_are_named(make):
    model, x = make()
    y = torch.zeros(2, 6, dtype=torch.int64)
    with refuses("tensors of different types meet", r"\.to\(dtype\)"):
        MetaLearner(model, F.cross_entropy).backward(((x, y), (x, y)))


@pytest.mark.parametrize("message", ["size mismatch", "CUDA out of memory"])
def test_other_errors_have_no_advice(message):
    assert find_advice(RuntimeError(message)) is None


class SquareWithoutTangent(torch.autograd.Function):
    """A function that torch can vmap, but that has no `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize(
    "method", [Forward(), Implicit(CG(2), products="forward-over-reverse")], ids=["forward", "cg"]
)
def test_a_function_without_jvp_is_refused_in_forward_mode(method, vectorize):
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2)},
        inner_loss=lambda params, meta, data: (
            SquareWithoutTangent.apply(params["w"] - data).sum() * meta["a"]
        ),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    with pytest.raises(UnsupportedOperationError, match="without jvp; add it, or use reverse mode"):
        hypergradient(
            problem,
            {"a": torch.tensor(0.5)},
            torch.ones(3, 2),
            inner=INNER,
            method=method,
            batched=True,
            vectorize=vectorize,
        )


def test_tensors_of_two_types_on_one_device_are_no_tensors_of_two_devices():
    of_convolution = (
        "Input type (torch.cuda.DoubleTensor) and weight type (torch.cuda.FloatTensor) should be "
        "the same"
    )
    assert find_advice(RuntimeError(of_convolution)).startswith("tensors of different types meet")


@pytest.mark.parametrize(
    "message",
    [
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the "
        "same or input should be a MKLDNN tensor and weight is a dense tensor",
        "Expected all tensors to be on the same device, but got mat1 is on cpu, different from "
        "other tensors on cuda:0",
        "Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be the "
        "same or input should be a MKLDNN tensor and weight is a dense tensor",
    ],
)
def test_what_torch_says_of_two_devices_is_explained(message):
    advice = find_advice(RuntimeError(message))
    assert advice.startswith(f"tensors on different devices meet ({message}")
