"""The bilevel problems that compare.py runs on, all in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metaimplicit import BilevelProblem, Composite, GradientDescent, MetaLearner, Proximal
from metaimplicit.inner import InnerLoop
from metaimplicit.methods import Curvature
from metaimplicit.models import ConvNet
from metaimplicit.params import Params
from tasks import EpisodeSampler, load

# An inner loop that ends where it starts, for problems whose `init` is the argmin.
STAY_AT_START = GradientDescent(steps=1, lr=0.0)


@dataclass(frozen=True)
class Instance:
    """A bilevel problem with its meta-parameters, its data and its inner loop.

    Attributes:
        problem: The problem.
        meta: The meta-parameters at which to take the hypergradient.
        data: The data of both losses.
        inner: The inner loop.
        curvature: The curvature of the implicit methods.
        batched: Whether `data` is a batch of tasks.
    """

    problem: BilevelProblem
    meta: Params
    data: Any
    inner: InnerLoop = STAY_AT_START
    curvature: Curvature = "hessian"
    batched: bool = False


def quadratic(spectrum: Tensor, damping: float = 0.0, seed: int = 0) -> Instance:
    """A quadratic: f = ½θᵀHθ + ½σ‖θ‖² − φᵀθ and g = ½‖θ − t‖², φ and t standard normal.

    Args:
        spectrum: The eigenvalues of H, `[n]`, in float64. Its eigenvectors are a random basis.
        damping: σ. Solvers know this multiple of the identity.
        seed: Seed of all draws.
    """
    draw = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    h = symmetric_matrix(spectrum, draw)
    phi = torch.randn(n, generator=draw, dtype=torch.float64)
    target = torch.randn(n, generator=draw, dtype=torch.float64)
    star = torch.linalg.solve(h + damping * torch.eye(n, dtype=torch.float64), phi)
    inner_loss = Composite(
        outputs=lambda params, meta, data: torch.stack([params["theta"], meta["phi"]]),
        loss=lambda z, data: 0.5 * z[0] @ h @ z[0] - z[0] @ z[1],
        penalty=Proximal(damping, center="zero"),
    )
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": star},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: 0.5 * (params["theta"] - target).square().sum(),
    )
    return Instance(problem, {"phi": phi}, data=h)


def drifting_systems(drift: float, count: int = 50, n: int = 200) -> Iterator[Instance]:
    """Quadratics f = ½θᵀAθ − φᵀθ and g = bᵀθ, where A and b move from system to system.

    The first A has the condition 1000. From one system to the next, A and b each move by a random
    step of `drift` times their (spectral) norms. The data are (A, b).

    Args:
        drift: Relative length of the steps.
        count: Number of systems.
        n: Number of unknowns.
    """
    draw = torch.Generator().manual_seed(0)
    a = symmetric_matrix(torch.logspace(-3, 0, n).double(), draw)
    b = torch.randn(n, generator=draw, dtype=torch.float64)
    zero = torch.zeros(n, dtype=torch.float64)

    def inner_loss(params: Params, meta: Params, data: Any) -> Tensor:
        theta = params["theta"]
        matrix: Tensor = data[0]
        return (0.5 * matrix @ theta - meta["phi"]) @ theta

    problem = BilevelProblem(
        init=lambda meta, data: {"theta": zero},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: data[1] @ params["theta"],
    )
    for _ in range(count):
        yield Instance(problem, {"phi": zero}, data=(a, b))
        noise = torch.randn(n, n, generator=draw, dtype=torch.float64)
        shift = torch.randn(n, generator=draw, dtype=torch.float64)
        noise = noise + noise.T
        a_norm = torch.linalg.matrix_norm(a, 2)
        a = a + drift * a_norm * noise / torch.linalg.matrix_norm(noise, 2)
        b = b + drift * b.norm() * shift / shift.norm()


def symmetric_matrix(spectrum: Tensor, draw: torch.Generator) -> Tensor:
    """A symmetric matrix with these eigenvalues, `[n]`, and random eigenvectors."""
    n = len(spectrum)
    basis = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q
    matrix: Tensor = basis @ torch.diag(spectrum) @ basis.T
    return matrix


def logistic(seed: int = 1, test: int = 0) -> Instance:
    """The decays of the 100 weights of a logistic regression (Hataya & Yamada 2023).

    Labels are 1[w·x + 0.1ε > 0]. With the mean binary cross-entropy (BCE),

        f = BCE of 500 points + ½ Σᵢ φᵢ θᵢ²,    g = BCE of 500 other points,

    and φ = 1. The inner loop takes 100 steps of 0.1 from zero.

    Args:
        seed: Seed of the data.
        test: Number of further points at the end of the data, which no loss sees.
    """
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(100, generator=draw, dtype=torch.float64)

    def draw_points(n: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(n, 100, generator=draw, dtype=torch.float64)
        noise = 0.1 * torch.randn(n, generator=draw, dtype=torch.float64)
        return inputs, (inputs @ w + noise > 0).double()

    inputs, labels = draw_points(1000)
    test_inputs, test_labels = draw_points(test)

    def cross_entropy(params: Params, points: slice) -> Tensor:
        logits = inputs[points] @ params["w"]
        return F.binary_cross_entropy_with_logits(logits, labels[points])

    def inner_loss(params: Params, meta: Params, data: Any) -> Tensor:
        fit = cross_entropy(params, slice(500))
        return fit + 0.5 * (meta["decay"] * params["w"].square()).sum()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(100, dtype=torch.float64)},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: cross_entropy(params, slice(500, 1000)),
    )
    return Instance(
        problem,
        {"decay": torch.ones(100, dtype=torch.float64)},
        data=(torch.cat([inputs, test_inputs]), torch.cat([labels, test_labels])),
        inner=GradientDescent(steps=100, lr=0.1),
    )


def digits(decay: float, curvature: Curvature = "hessian", seed: int = 0) -> Instance:
    """A 64-24-10 tanh network on scikit-learn's digits. φ is the scale of each pixel.

    f is the cross-entropy of 1000 digits plus ½ decay ‖θ‖², and g that of the others. `init` is an
    argmin of f, found by L-BFGS.

    Args:
        decay: Strength of the decay.
        curvature: Curvature of the implicit methods.
        seed: Seed of the network's initialisation.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.as_tensor(bunch.data / 16.0)
    labels = torch.as_tensor(bunch.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    minimise(model, images[:1000], labels[:1000], decay=decay)
    star = {name: p.detach().clone() for name, p in model.named_parameters()}

    def outputs(params: Params, meta: Params, inputs: Tensor) -> Tensor:
        scores: Tensor = functional_call(model, params, (inputs * meta["scale"],))
        return scores

    def outer_loss(params: Params, meta: Params, data: Any) -> Tensor:
        return F.cross_entropy(outputs(params, meta, images[1000:]), labels[1000:])

    inner_loss = Composite(
        outputs=lambda params, meta, data: outputs(params, meta, images[:1000]),
        loss=lambda z, data: F.cross_entropy(z, labels[:1000]),
        penalty=Proximal(decay, center="zero"),
        module=model,
    )
    return Instance(
        BilevelProblem(lambda meta, data: star, inner_loss, outer_loss),
        {"scale": torch.ones(64, dtype=torch.float64)},
        data=images,
        curvature=curvature,
    )


def minimise(model: nn.Module, inputs: Tensor, labels: Tensor, *, decay: float) -> None:
    """Minimise the cross-entropy plus ½ decay ‖θ‖² by L-BFGS, in place."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=2000,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = sum(p.square().sum() for p in model.parameters())
        loss = F.cross_entropy(model(inputs), labels) + 0.5 * decay * squares
        loss.backward()
        return loss

    optimizer.step(closure)


def episodes(data_root: Path | None, curvature: Curvature, meta_steps: int = 100) -> Instance:
    """Four 5-way 1-shot tasks for a meta-trained conv net. φ is its initialisation.

    The net has 8 channels; λ = 0.5, and the inner loop takes 8 steps of 0.3.

    Args:
        data_root: Folder with Omniglot. If None, the tasks are glyphs.
        curvature: Curvature of the implicit methods.
        meta_steps: Number of steps of meta-training.
    """
    name = "omniglot" if data_root else "glyphs"
    family = load(name, ways=5, shots=1, queries=5, data_root=data_root).train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ConvNet(family.input_shape, family.outputs, filters=8)
    learner = MetaLearner(
        model,
        F.cross_entropy,
        inner=GradientDescent(steps=8, lr=0.3),
        method="cg",
        proximal=0.5,
        vectorize="vmap",
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=4e-3)
    sampler = EpisodeSampler(family, tasks=8, seed=0)
    for i in range(meta_steps):
        learner.backward(sampler[i])
        optimizer.step()
        optimizer.zero_grad()

    learner.double()
    batch = EpisodeSampler(family, tasks=4, seed=1)[0]
    support, query = (
        (inputs.double(), targets) for inputs, targets in (batch.support, batch.query)
    )
    return Instance(
        learner.problem,
        {name: p.detach() for name, p in learner.model.named_parameters()},
        data=(support, query),
        inner=learner.inner,
        curvature=curvature,
        batched=True,
    )


def named_problems(data_root: Path | None) -> dict[str, Callable[[], Instance]]:
    """A function that makes each problem, by name. `data_root` is that of `episodes`."""
    well = torch.linspace(1, 10, 1000, dtype=torch.float64)
    ill = torch.logspace(-4, 0, 1000, dtype=torch.float64)
    decaying = 5 * 0.8 ** torch.arange(1000, dtype=torch.float64)
    indefinite = torch.cat([-torch.logspace(-3, -1, 50), torch.logspace(-3, 1, 950)]).double()
    return {
        "quadratic-well": partial(quadratic, well),
        "quadratic-ill": partial(quadratic, ill),
        "quadratic-decaying": partial(quadratic, decaying, damping=0.1),
        "quadratic-indefinite": partial(quadratic, indefinite),
        "logistic": logistic,
        "digits-0.1": partial(digits, 0.1),
        "digits-0.01": partial(digits, 0.01),
        "digits-0.001": partial(digits, 0.001),
        "digits-0.001-gn": partial(digits, 0.001, "gauss-newton"),
        "episodes": partial(episodes, data_root, "gauss-newton"),
        "episodes-hessian": partial(episodes, data_root, "hessian"),
    }
