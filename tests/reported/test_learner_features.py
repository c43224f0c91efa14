"""Inner optimisers, losses and models that people bring to MetaLearner."""

import pytest
import torch
from oracles import finite_difference
from reported.helpers import (
    INNER,
    LR,
    STEPS,
    assert_learns,
    assert_same,
    draw,
    plain_maml,
    refuses,
    split,
)
from torch import nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F

from metaimplicit import MetaLearner, TorchOptimizer, Unrolled


def clipped_descent(loss, start):
    """Gradient descent with the factor of torch.nn.utils.clip_grad_norm_, differentiated."""
    params = start
    for _ in range(STEPS):
        gradients = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        factor = (0.3 / (norm + 1e-6)).clamp(max=1.0)
        pairs = zip(params.items(), gradients, strict=True)
        params = {name: p - LR * factor * g for (name, p), g in pairs}
    return [params]


def test_inner_gradients_are_clipped_task_by_task():
    model = nn.Linear(4, 5)
    episodes = draw()
    episodes.support[0][0].mul_(0.01)  # the gradient of this task is never clipped
    expected = plain_maml(model, split(episodes), descend=clipped_descent)
    inner = TorchOptimizer(torch.optim.SGD, steps=STEPS, lr=LR, max_grad_norm=0.3)
    assert_learns(expected, model, episodes, inner=inner)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.NAdam, {}), (torch.optim.RAdam, {}), (torch.optim.RMSprop, {"centered": True})],
    ids=["NAdam", "RAdam", "centred RMSprop"],
)
def test_this_inner_optimizer_steps_as_in_torch_and_is_differentiated(optimizer, options):
    model = nn.Linear(4, 5, bias=False)
    episodes = draw()

    def query_loss(weight, task):
        (x, y), (x_query, y_query) = task
        adapted = weight.clone().requires_grad_()
        stepper = optimizer([adapted], lr=LR, **options)
        for _ in range(8):  # RAdam rectifies its step from the sixth on
            (adapted.grad,) = torch.autograd.grad(F.cross_entropy(x @ adapted.T, y), adapted)
            stepper.step()
        return F.cross_entropy(x_query @ adapted.T, y_query).detach()

    def mean_loss(weight):
        return torch.stack([query_loss(weight, task) for task in split(episodes)]).mean()

    inner = TorchOptimizer(optimizer, steps=8, lr=LR, **options)
    step = MetaLearner(model, F.cross_entropy, inner=inner, method=Unrolled()).backward(episodes)
    weight = model.weight.detach()
    direction = torch.randn(5, 4)
    slope = finite_difference(mean_loss, weight, direction, step=1e-4)
    assert_same(step.loss, mean_loss(weight))
    # The differences are known to about 5e-9.
    assert_same((model.weight.grad * direction).sum(), slope, rtol=1e-7)


class LearntLoss(nn.Module):
    """Cross-entropy at a temperature that is learnt."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.t, targets)


def test_the_parameters_of_a_learnt_loss_get_their_gradient():
    model = nn.Linear(4, 5)
    loss = LearntLoss()
    episodes = draw()
    learner = assert_learns(plain_maml(model, split(episodes), loss), model, episodes, loss)
    assert any(parameter is loss.t for parameter in learner.parameters())


def test_the_query_set_may_have_another_loss():
    model = nn.Linear(4, 5)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    episodes = draw()
    expected = plain_maml(model, split(episodes), loss, query_loss=F.cross_entropy)
    assert_learns(expected, model, episodes, loss, query_loss=F.cross_entropy)


def compiled(model):
    torch._dynamo.reset()  # no earlier compilation in this process decides whether this one is used
    return torch.compile(model, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "patterns"),
    [
        pytest.param(compiled, ["compile", "first-order|finite-differences"], id="torch.compile"),
        pytest.param(nn.DataParallel, ["DataParallel", r"\.module"], id="DataParallel"),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # from inside torch.compile
def test_a_wrapped_model_that_cannot_be_unrolled_is_refused_with_a_remedy(wrap, patterns):
    # Under vmap the compiled model works, so the loop is what has to be refused.
    options = {"inner": INNER, "method": Unrolled(), "vectorize": "loop"}
    with functorch_config.patch(cse=False), refuses(*patterns):  # it would import all of inductor
        MetaLearner(wrap(nn.Linear(4, 5)), F.cross_entropy, **options).backward(draw())


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # of hooks on all modules
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # from inside torch.compile
def test_a_compiled_model_learns_as_it_does_uncompiled(vectorize):
    torch._dynamo.reset()
    options = {"inner": INNER, "method": "unrolled", "vectorize": vectorize}
    gradients = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))
        MetaLearner(wrap(model), F.cross_entropy, **options).backward(draw())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)
