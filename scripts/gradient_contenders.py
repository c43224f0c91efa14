"""What races for one meta-gradient: workloads, and the libraries that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hand_written import by_hand
from torch import Tensor, nn

from metaimplicit import CG, GradientDescent, Implicit, MetaLearner, Unrolled
from metaimplicit.methods import Method
from metaimplicit.models import ConvNet
from metaimplicit.normalization import BatchNorm

Step = Callable[[], list[Tensor]]  # computes the meta-gradient, by parameter


@dataclass(frozen=True)
class Workload:
    """What is differentiated: the mean query loss after steps of gradient descent from φ.

    Args:
        network: It makes the network.
        shape: That of one input.
        ways: The number of classes. If 0, the targets are numbers.
        tasks: The number of tasks.
        support: The number of support examples of a task.
        query: The number of its query examples.
        steps: The number of inner steps.
        lr: Their size.
        proximal: The strength λ of λ/2 ‖θ − φ‖² in the inner loss. If above 0, the meta-gradient is
            implicit, by five steps of CG (iMAML).
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ways: int
    tasks: int
    support: int
    query: int
    steps: int
    lr: float
    proximal: float = 0.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a set."""
        loss = F.cross_entropy if self.ways else F.mse_loss
        return loss(outputs, targets)

    def make_model(self, native_norm: bool = False) -> nn.Module:
        """The network, from a fixed seed. Other libraries are given torch's own batch norm."""
        torch.manual_seed(0)
        model = self.network()
        if native_norm:
            _replace_norms(model)
        return model

    def draw(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Support and query sets of all tasks, from a fixed seed."""
        generator = torch.Generator().manual_seed(1)

        def draw_set(count: int) -> tuple[Tensor, Tensor]:
            inputs = torch.randn(
                self.tasks,
                count,
                *self.shape,
                generator=generator,
            )
            if self.ways:
                labels = torch.arange(count) % self.ways
                return inputs, labels.expand(self.tasks, -1).contiguous()
            return inputs, torch.randn(self.tasks, count, 1, generator=generator)

        return draw_set(self.support), draw_set(self.query)


def perceptron() -> nn.Module:
    """The network of MAML's sinusoids."""
    layers = (nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return nn.Sequential(*layers)


def sinusoid(steps: int) -> Workload:
    """MAML on 25 sinusoids, ten support and ten query points each (Finn et al. 2017, §5.1)."""
    return Workload(
        perceptron,
        (1,),
        0,
        tasks=25,
        support=10,
        query=10,
        steps=steps,
        lr=0.01,
    )


def convolutional(*, strided: bool, **changes: Any) -> Workload:
    """Eight tasks of 5 ways, 1 shot and 3 queries of 28 × 28 pixels; conv-4 with 64 filters."""
    network = partial(ConvNet, (1, 28, 28), 5, filters=64, strided=strided)
    options: dict[str, Any] = {"tasks": 8, "support": 5, "query": 15, "steps": 5, "lr": 0.1}
    return Workload(network, (1, 28, 28), 5, **(options | changes))


WORKLOADS: dict[str, Workload] = {
    **{f"sinusoid, {steps} steps": sinusoid(steps) for steps in (1, 5, 10)},
    "conv-4 pooled, 5 steps": convolutional(strided=False),
    "conv-4 strided, 5 steps": convolutional(strided=True),
    "iMAML perceptron, 16 steps": Workload(
        perceptron,
        (1,),
        0,
        tasks=25,
        support=10,
        query=10,
        steps=16,
        lr=0.01,
        proximal=10.0,
    ),
    "iMAML conv-4, 16 steps": convolutional(
        strided=True, steps=16, tasks=4, lr=0.01, proximal=10.0
    ),
}


def ours(workload: Workload, *, compile: bool) -> Step:
    """This library's `MetaLearner`."""
    model = workload.make_model()
    method: Method = Unrolled()
    if workload.proximal:
        method = Implicit(CG(max_steps=5), curvature="hessian")
    learner = MetaLearner(
        model,
        workload.loss,
        inner=GradientDescent(steps=workload.steps, lr=workload.lr),
        method=method,
        proximal=workload.proximal,
        compile=compile,
    )
    batch = workload.draw()

    def step() -> list[Tensor]:
        learner.zero_grad()
        learner.backward(batch)
        return _gradients(model)

    return step


def torch_func(workload: Workload) -> Step:
    """Plain `torch.func`: the gradient of a vmapped loop, as its tutorial has it."""
    model = workload.make_model()
    params = {name: p.detach() for name, p in model.named_parameters()}
    support, query = workload.draw()

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return workload.loss(torch.func.functional_call(model, params, (inputs,)), targets)

    def query_loss(params: dict[str, Tensor], *sets: Tensor) -> Tensor:
        x, y, x_query, y_query = sets
        for _ in range(workload.steps):
            slopes = torch.func.grad(loss)(params, x, y)
            params = {name: p - workload.lr * slopes[name] for name, p in params.items()}
        return loss(params, x_query, y_query)

    def total(params: dict[str, Tensor]) -> Tensor:
        each = torch.vmap(query_loss, in_dims=(None, 0, 0, 0, 0))
        return each(params, *support, *query).mean()

    return lambda: list(torch.func.grad(total)(params).values())


def higher(workload: Workload) -> Step:
    """`higher`'s inner loop, one task after another, as its examples have it."""
    from higher import innerloop_ctx

    model = workload.make_model(native_norm=True)
    support, query = workload.draw()

    def step() -> list[Tensor]:
        model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)
        for x, y, x_query, y_query in zip(*support, *query, strict=True):
            with innerloop_ctx(model, optimizer, copy_initial_weights=False) as (adapted, inner):
                for _ in range(workload.steps):
                    inner.step(workload.loss(adapted(x), y))
                (workload.loss(adapted(x_query), y_query) / workload.tasks).backward()
        return _gradients(model)

    return step


def learn2learn(workload: Workload) -> Step:
    """learn2learn's `MAML`, one task after another, as its examples have it."""
    from learn2learn.algorithms import MAML

    model = workload.make_model(native_norm=True)
    maml = MAML(model, lr=workload.lr)
    support, query = workload.draw()

    def step() -> list[Tensor]:
        model.zero_grad()
        for x, y, x_query, y_query in zip(*support, *query, strict=True):
            learner = maml.clone()
            for _ in range(workload.steps):
                learner.adapt(workload.loss(learner(x), y))
            (workload.loss(learner(x_query), y_query) / workload.tasks).backward()
        return _gradients(model)

    return step


def torchopt(workload: Workload) -> Step:
    """TorchOpt's `custom_root` with five steps of CG, as its iMAML example has it."""
    import torchopt as package
    from torchopt.diff.implicit import custom_root

    model = workload.make_model(native_norm=True)
    names = [name for name, _ in model.named_parameters()]
    support, query = workload.draw()

    def loss(params: tuple[Tensor, ...], inputs: Tensor, targets: Tensor) -> Tensor:
        by_name = dict(zip(names, params, strict=True))
        return workload.loss(torch.func.functional_call(model, by_name, (inputs,)), targets)

    def inner_loss(params: Any, start: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        squares = [(p - q).square().sum() for p, q in zip(params, start, strict=True)]
        return loss(params, *data) + workload.proximal / 2 * torch.stack(squares).sum()

    def descend(params: Any, start: Any, data: Any) -> Any:
        for _ in range(workload.steps):
            with torch.enable_grad():
                params = tuple(p.detach().requires_grad_() for p in params)
                slopes = torch.autograd.grad(inner_loss(params, start, data), params)
            params = tuple(
                p.detach() - workload.lr * g for p, g in zip(params, slopes, strict=True)
            )
        return params

    solver = package.linear_solve.solve_cg(maxiter=5, atol=0)
    stationarity = torch.func.grad(inner_loss, argnums=0)
    solve: Any = custom_root(stationarity, argnums=1, solve=solver)(descend)

    def step() -> list[Tensor]:
        model.zero_grad()
        start = tuple(model.parameters())
        for x, y, x_query, y_query in zip(*support, *query, strict=True):
            params = tuple(p.detach().clone().requires_grad_() for p in start)
            end = solve(params, start, (x, y))
            (loss(end, x_query, y_query) / workload.tasks).backward()
        return _gradients(model)

    return step


class Contender(NamedTuple):
    """Who takes part.

    Attributes:
        make: It makes the step.
        package: What has to be installed.
        implicit: Whether it takes part where the meta-gradient is implicit. If None, in all.
    """

    make: Callable[[Workload], Step]
    package: str = "torch"
    implicit: bool | None = None


CONTENDERS: dict[str, Contender] = {
    "metaimplicit": Contender(partial(ours, compile=False)),
    "metaimplicit, compiled": Contender(partial(ours, compile=True)),
    "torch.func": Contender(torch_func, implicit=False),
    "by hand": Contender(partial(by_hand, compile=False)),
    "by hand, compiled": Contender(partial(by_hand, compile=True)),
    "higher": Contender(higher, "higher", implicit=False),
    "learn2learn": Contender(learn2learn, "learn2learn", implicit=False),
    "TorchOpt": Contender(torchopt, "torchopt", implicit=True),
}


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, BatchNorm):
            norm = nn.BatchNorm2d(len(child.weight), child.eps, track_running_stats=False)
            setattr(module, name, norm)
        _replace_norms(child)
