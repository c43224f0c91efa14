"""The bilevel problems that compare.py runs on, all in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metaimplicit import (
    BilevelProblem,
    Composite,
    GradientDescent,
    InnerLoop,
    MetaLearner,
    Proximal,
)
from metaimplicit.methods import Curvature
from metaimplicit.models import ConvNet
from tasks import EpisodeSampler, load

STAY = GradientDescent(steps=1, lr=0.0)  # where `init` is the argmin


@dataclass(frozen=True)
class Case:
    """A problem with its data, and what `compare` needs to know of it."""

    problem: BilevelProblem
    meta: dict[str, Tensor]
    data: Any
    inner: InnerLoop = STAY
    curvature: Curvature = "hessian"
    batched: bool = False


def quadratic(spectrum: Tensor, damping: float = 0.0, seed: int = 0) -> Case:
    """f = ½θᵀHθ + ½σ‖θ‖² − φᵀθ and g = ½‖θ − t‖², n = dim φ; H has the spectrum given, in a random basis."""
    draw, n = torch.Generator().manual_seed(seed), len(spectrum)
    h = _symmetric(spectrum, draw)
    phi, target = (torch.randn(n, generator=draw, dtype=torch.float64) for _ in range(2))
    star = torch.linalg.solve(h + damping * torch.eye(n, dtype=torch.float64), phi)
    return Case(
        BilevelProblem(
            init=lambda meta, data: {"theta": star},
            inner_loss=Composite(
                outputs=lambda params, meta, data: torch.stack([params["theta"], meta["phi"]]),
                loss=lambda z, data: 0.5 * z[0] @ h @ z[0] - z[0] @ z[1],
                penalty=Proximal(damping, center="zero"),
            ),
            outer_loss=lambda params, meta, data: 0.5 * (params["theta"] - target).square().sum(),
        ),
        {"phi": phi},
        h,
    )


def drifting(drift: float, count: int = 50, n: int = 200) -> Iterator[Case]:
    """f = ½θᵀAθ − φᵀθ, g = bᵀθ: A of condition 1000, and A and b moved by `drift` of their norms from case to case."""
    draw = torch.Generator().manual_seed(0)
    a, b = (
        _symmetric(torch.logspace(-3, 0, n).double(), draw),
        torch.randn(n, generator=draw, dtype=torch.float64),
    )
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.zeros(n, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: (
            (0.5 * data[0] @ params["theta"] - meta["phi"]) @ params["theta"]
        ),
        outer_loss=lambda params, meta, data: data[1] @ params["theta"],
    )
    for _ in range(count):
        yield Case(problem, {"phi": torch.zeros(n, dtype=torch.float64)}, (a, b))
        noise, shift = (
            torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((n, n), (n,))
        )
        noise = noise + noise.T
        a = a + drift * torch.linalg.matrix_norm(a, 2) * noise / torch.linalg.matrix_norm(noise, 2)
        b = b + drift * b.norm() * shift / shift.norm()


def _symmetric(spectrum: Tensor, draw: torch.Generator) -> Tensor:
    n = len(spectrum)
    basis = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q
    matrix: Tensor = basis @ torch.diag(spectrum) @ basis.T
    return matrix


def logistic(seed: int = 1, test: int = 0) -> Case:
    """The decay of each of the 100 weights of a logistic regression, 500 + 500 points, 100 inner steps of 0.1 from 0.

    Hataya & Yamada (2023): y = 1[w·x + 0.1ε > 0], f = BCE + ½Σφᵢθᵢ², g = BCE on the other half, φ = 1 at the start.
    The data end with `test` more points, which no loss sees.
    """
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(100, generator=draw, dtype=torch.float64)
    parts = []
    for points in (1000, test):
        drawn = torch.randn(points, 100, generator=draw, dtype=torch.float64)
        noise = 0.1 * torch.randn(points, generator=draw, dtype=torch.float64)
        parts.append((drawn, (drawn @ w + noise > 0).double()))
    x, y = (torch.cat(both) for both in zip(*parts, strict=True))

    def fit(params: Any, part: slice) -> Tensor:
        return F.binary_cross_entropy_with_logits(x[part] @ params["w"], y[part])

    return Case(
        BilevelProblem(
            init=lambda meta, data: {"w": torch.zeros(100, dtype=torch.float64)},
            inner_loss=lambda params, meta, data: (
                fit(params, slice(500)) + 0.5 * (meta["decay"] * params["w"].square()).sum()
            ),
            outer_loss=lambda params, meta, data: fit(params, slice(500, 1000)),
        ),
        {"decay": torch.ones(100, dtype=torch.float64)},
        (x, y),
        inner=GradientDescent(steps=100, lr=0.1),
    )


def digits(decay: float, curvature: Curvature = "hessian", seed: int = 0) -> Case:
    """A 64-24-10 tanh network on 1000 of scikit-learn's digits, trained to its argmin; φ: the scale of each pixel."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.as_tensor(found.data / 16.0), torch.as_tensor(found.target)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    penalty = Proximal(decay, center="zero")
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
        loss = F.cross_entropy(model(images[:1000]), labels[:1000]) + 0.5 * decay * squares
        loss.backward()
        return loss

    optimizer.step(closure)
    star = {name: p.detach().clone() for name, p in model.named_parameters()}

    def outputs(params: Any, meta: Any, inputs: Tensor) -> Tensor:
        return functional_call(model, params, (inputs * meta["scale"],))  # type: ignore[no-any-return]

    return Case(
        BilevelProblem(
            init=lambda meta, data: star,
            inner_loss=Composite(
                outputs=lambda params, meta, data: outputs(params, meta, images[:1000]),
                loss=lambda z, data: F.cross_entropy(z, labels[:1000]),
                penalty=penalty,
                module=model,
            ),
            outer_loss=lambda params, meta, data: F.cross_entropy(
                outputs(params, meta, images[1000:]), labels[1000:]
            ),
        ),
        {"scale": torch.ones(64, dtype=torch.float64)},
        images,
        curvature=curvature,
    )


def episodes(data_root: Path | None, curvature: Curvature, meta_steps: int = 100) -> Case:
    """Four 5-way 1-shot tasks, Omniglot's if `data_root` is given, else glyphs; a conv net of 8 channels after some
    meta-training; λ = 0.5, 8 steps of 0.3; φ: the initialisation."""
    family = load(
        "omniglot" if data_root else "glyphs", ways=5, shots=1, queries=5, data_root=data_root
    ).train
    with torch.random.fork_rng():
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
    return Case(
        learner.problem,
        {name: p.detach() for name, p in learner.model.named_parameters()},
        (support, query),
        inner=learner.inner,
        curvature=curvature,
        batched=True,
    )


def problems(data_root: Path | None) -> dict[str, Callable[[], Case]]:
    """Every problem by name."""
    i = torch.arange(1000, dtype=torch.float64)
    made: dict[str, Callable[[], Case]] = {
        "quadratic-well": lambda: quadratic(torch.linspace(1, 10, 1000, dtype=torch.float64)),
        "quadratic-ill": lambda: quadratic(torch.logspace(-4, 0, 1000, dtype=torch.float64)),
        "quadratic-decaying": lambda: quadratic(5 * 0.8**i, damping=0.1),
        "quadratic-indefinite": lambda: quadratic(
            torch.cat([-torch.logspace(-3, -1, 50), torch.logspace(-3, 1, 950)]).double()
        ),
        "logistic": logistic,
    }
    for decay in (1e-1, 1e-2, 1e-3):
        made[f"digits-{decay:g}"] = lambda decay=decay: digits(decay)  # type: ignore[misc]
    made["digits-0.001-gn"] = lambda: digits(1e-3, "gauss-newton")
    made["episodes"] = lambda: episodes(data_root, "gauss-newton")
    made["episodes-hessian"] = lambda: episodes(data_root, "hessian")
    return made
