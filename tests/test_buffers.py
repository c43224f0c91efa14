"""Buffers that move in every forward pass, where a method compares several passes."""

import threading

import pytest
import torch
from oracles import randn, relative_error
from torch import nn
from torch.nn import functional as F

from metaimplicit import CG, GradientDescent, Implicit, Proximal, hypergradient
from metaimplicit.buffers import at_rest, restored_buffers
from metaimplicit.methods import SAMA, ValueFunction
from metaimplicit.operators import central_difference
from metaimplicit.problem import Stream
from metaimplicit.tuning import ExampleWeights, tuning_problem


class Counter(nn.Module):
    """x + n, where n is the number of calls before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        y = x + self.n
        self.n += 1
        return y


class Centred(nn.Module):
    """A linear layer of x less a running mean of the inputs, which moves by 1 % in each call."""

    def __init__(self, moving):
        super().__init__()
        self.fc = nn.Linear(3, 2, dtype=torch.float64)
        self.moving = moving
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        if self.moving:
            self.mean.lerp_(x.mean(0), 0.01)
        return self.fc(x - self.mean)


def test_calls_in_the_block_see_each_other_and_leave_no_trace():
    counter = Counter()
    own = counter.n
    with restored_buffers():
        seen = [counter(torch.zeros(())).item() for _ in range(3)]
        assert counter.n is own
    assert seen == [0, 1, 2]
    assert counter.n is own
    assert own == 0


def test_a_buffer_that_is_replaced_or_shared_is_put_back():
    class Replacing(nn.Module):
        def __init__(self, counter):
            super().__init__()
            self.counter = counter
            self.register_buffer("n", counter.n)
            self.register_buffer("twice", torch.zeros(()))

        def forward(self, x):
            self.twice = self.twice + 2
            self.counter(x)
            return self.n + self.twice  # what the counter has written to

    counter = Counter()
    module = Replacing(counter)
    twice = module.twice
    with restored_buffers():
        assert [module(torch.zeros(())).item() for _ in range(2)] == [3, 6]
    assert module.twice is twice
    assert module.n is counter.n
    assert (twice.item(), counter.n.item()) == (0, 0)


def test_a_call_that_fails_and_another_thread_keep_their_buffers():
    class Failing(Counter):
        def forward(self, x):
            super().forward(x)
            raise ValueError("after the write")

    failing = Failing()
    other = Counter()
    with restored_buffers():
        with pytest.raises(ValueError, match="after the write"):
            failing(torch.zeros(()))
        thread = threading.Thread(target=other, args=(torch.zeros(()),))
        thread.start()
        thread.join()
        assert failing.n == 0
    assert other.n == 1


def test_a_buffer_that_a_call_makes_is_watched_from_the_next_one_on():
    class Late(nn.Module):
        def forward(self, x):
            if not hasattr(self, "n"):
                self.register_buffer("n", torch.zeros(()))
            self.n += 1
            return x + self.n

    module = Late()
    with restored_buffers():
        assert [module(torch.zeros(())).item() for _ in range(3)] == [1, 2, 3]
    assert module.n == 1
    module = Late()
    function = at_rest(module)
    assert [function(torch.zeros(())).item() for _ in range(3)] == [1, 2, 2]


def test_of_two_blocks_the_inner_one_acts():
    counter = Counter()
    own = counter.n
    with restored_buffers():
        counter(torch.zeros(()))
        with restored_buffers():
            assert [counter(torch.zeros(())).item() for _ in range(2)] == [0, 1]
        assert counter(torch.zeros(())).item() == 1
    assert counter.n is own
    assert own == 0


def test_a_scripted_module_beside_others_is_left_alone():
    counter = Counter()
    model = nn.Sequential(counter, torch.jit.script(nn.Linear(3, 2).double()))
    x = randn(4, 3, seed=0)
    with restored_buffers():
        y = model(x)
    assert torch.equal(y, model[1](x))
    assert counter.n == 0


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="eager"),
    "without breaks": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "in place": lambda model: model.compile(backend="eager") or model,
    "a part": lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:]),
    "a function": lambda model: torch.compile(lambda x: model(x), backend="eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", COMPILED.values(), ids=COMPILED)
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # of hooks on all modules
def test_a_compiled_module_keeps_its_buffers(wrap):
    torch._dynamo.reset()
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    call = wrap(model)
    x = randn(8, 2, seed=1)
    function = at_rest(lambda: call(x).sum())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            function()
    assert model[0].running_mean.tolist() == [0, 0]
    call(x)
    assert model[0].num_batches_tracked == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_a_block_within_a_compiled_function_restores_buffers_too():
    model = nn.BatchNorm1d(2)

    def function(x):
        with restored_buffers():
            return model(x)

    torch._dynamo.reset()
    torch.compile(function, backend="eager")(torch.ones(3, 2))
    assert model.running_mean.tolist() == [0, 0]


def test_buffers_of_a_functional_call_do_not_stay_in_the_module():
    """They are those of the tasks. Under vmap, they would be dead afterwards."""
    model = Counter()
    own = model.n

    def call(n, x):
        return torch.func.functional_call(model, {"n": n}, (x,))

    with restored_buffers():
        y = torch.vmap(call)(torch.tensor([1.0, 2.0]), torch.zeros(2))
    assert y.tolist() == [1, 2]
    assert model.n is own
    assert own == 0


def test_the_ends_of_a_difference_see_the_same_buffers():
    """The change of the buffer, 1, would be divided by a step size of 1e-5."""
    counter = Counter()
    theta = {"w": randn(1, 4, seed=0)}
    slope = central_difference(lambda p: counter(p["w"].sum(1)), theta, torch.ones(1, 4))
    assert slope.item() == pytest.approx(4, rel=1e-9)
    assert counter.n == 0


@pytest.mark.parametrize(
    "method",
    [
        "unrolled",
        lambda batch: Implicit(CG(100), batch=batch),
        lambda batch: Implicit(CG(100), products="finite-differences", batch=batch),
        lambda batch: SAMA(batch=batch),
        lambda batch: ValueFunction(batch=batch),
    ],
    ids=["unrolled", "cg", "finite-differences", "sama", "f2sa"],
)
def test_a_hypergradient_is_nearly_that_of_buffers_at_rest(method):
    """The steps move the buffers a little, to which differences must add nothing."""
    train = (randn(8, 3, seed=1) + 1, torch.arange(8) % 2, torch.arange(8))
    validation = (randn(8, 3, seed=2) + 1.5, torch.arange(8) % 2)
    grads = []
    for moving in (True, False):
        torch.manual_seed(0)
        model = Centred(moving)
        model.mean.copy_(train[0].mean(0))
        tuning = tuning_problem(
            model,
            F.cross_entropy,
            [ExampleWeights(8)],
            penalty=Proximal(0.3, center="zero"),
        )
        result = hypergradient(
            tuning.problem,
            tuning.meta,
            Stream(lambda t: train if t < 50 else validation),
            inner=GradientDescent(steps=50, lr=0.3),
            method=method if isinstance(method, str) else method(train),
        )
        grads.append(result.grads["example_weights"])
    assert relative_error(*grads) < 0.05
