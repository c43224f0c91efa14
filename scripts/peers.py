"""Solvers and derivatives of public libraries, those that are installed, held against exact values beside ours."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metaimplicit import (
    CG,
    BilevelProblem,
    FromMeta,
    GradientDescent,
    Implicit,
    Method,
    Neumann,
    Nystrom,
    TorchOptimizer,
    Unrolled,
    hypergradient,
)

N, STEPS, SCALE, RHO = 8, 8, 0.1, 0.1
DRAW = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(N, N, generator=DRAW, dtype=torch.float64)).Q
H = BASIS @ torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64)) @ BASIS.T
V = torch.randn(N, generator=DRAW, dtype=torch.float64)
DEAD = H.clone()
DEAD[:, -1] = DEAD[-1] = 0.0  # of a unit that is dead


@dataclass(frozen=True)
class Row:
    """Relative errors against the exact value; None where there is no number."""

    what: str
    library: str
    theirs: float | None
    ours: float
    remark: str = ""


def inner(theta: Any, phi: Any, h: Tensor = H) -> Tensor:
    """f = ½θᵀHθ − φᵀθ, and with g = vᵀθ the hypergradient is H⁻¹v."""
    return 0.5 * (h @ theta).dot(theta) - phi.dot(theta)  # type: ignore[no-any-return]


def error(got: Tensor, exact: Tensor) -> float:
    """Relative."""
    return float((got - exact).norm() / exact.norm())


def ours(method: Method, h: Tensor = H) -> Tensor:
    """Our hypergradient of the same problem."""
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.zeros(N, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: inner(params["theta"], meta["phi"], h),
        outer_loss=lambda params, meta, data: V @ params["theta"],
    )
    meta = {"phi": torch.zeros(N, dtype=torch.float64)}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # with a dead unit A is singular, and the solve of A + ρI says so
        return hypergradient(
            problem, meta, V, inner=GradientDescent(steps=1, lr=0.0), method=method
        ).grads["phi"]


def polynomial(terms: int) -> Tensor:
    """Exactly so many terms of Neumann's series: what the others call one iteration less."""
    step = torch.eye(N, dtype=torch.float64) - SCALE * H
    return SCALE * sum(
        (torch.linalg.matrix_power(step, k) @ V for k in range(terms)), torch.zeros_like(V)
    )


def hypergrad(name: str, h: Tensor = H, **options: Any) -> Tensor:
    """A hypergradient of the package hypergrad."""
    solve = getattr(import_module("hypergrad.approx_hypergrad"), name)
    zero = (torch.zeros(N, dtype=torch.float64),)
    found: Tensor = solve(
        lambda i, o: inner(i[0], o[0], h),
        lambda i, o: V @ i[0] + 0 * o[0].sum(),
        zero,
        zero,
        **options,
    )[0]
    return found


def betty(name: str, **options: Any) -> Tensor:
    """A hypergradient of the package betty."""
    solve = getattr(import_module(f"betty.hypergradient.{name}"), name)
    theta, phi = (torch.zeros(N, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lower = SimpleNamespace(
        paths=[],
        config=SimpleNamespace(**options),
        cur_batch=None,
        training_step_exec=lambda batch: inner(theta, phi),
        trainable_parameters=lambda: [theta],
        parameters=lambda: [theta],
    )
    found: Tensor = solve([V], lower, SimpleNamespace(trainable_parameters=lambda: [phi]))[0]
    return found


def torchopt(name: str, **options: Any) -> Tensor:
    """A solve of the package torchopt."""
    found: Tensor = getattr(import_module("torchopt.linalg"), name)(lambda x: H @ x, V, **options)
    return found


def adam(beta: Tensor) -> Tensor:
    """vᵀθ after five steps of torch's Adam."""
    theta = torch.ones(N, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.1, betas=(0.9, float(beta)))
    for _ in range(5):
        optimizer.zero_grad()
        inner(theta, V).backward()
        optimizer.step()
    return V @ theta.detach()


def higher_adam(beta: Tensor) -> Tensor:
    """Its derivative with respect to β₂ by higher alone."""
    module = import_module("higher")
    theta, beta = (
        torch.ones(N, dtype=torch.float64, requires_grad=True),
        beta.clone().requires_grad_(),
    )
    optimizer = torch.optim.Adam([theta], lr=0.1)
    steps = module.get_diff_optim(optimizer, [theta], override={"betas": [(0.9, beta)]})
    at = theta
    for _ in range(5):
        (at,) = steps.step(inner(at, V), params=[at])
    return torch.autograd.grad(V @ at, beta)[0]


def our_adam(beta: Tensor) -> Tensor:
    """The same by ours."""
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.ones(N, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: inner(params["theta"], V),
        outer_loss=lambda params, meta, data: V @ params["theta"],
    )
    loop = TorchOptimizer(torch.optim.Adam, steps=5, lr=0.1, betas=(0.9, FromMeta("beta")))
    return hypergradient(problem, {"beta": beta}, V, inner=loop, method=Unrolled()).grads["beta"]


def conv_net() -> nn.Module:
    """98,970 parameters; smooth, as hypergrad's solve is singular where a sampled unit is dead."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.Tanh(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.Tanh(),
        nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(1536, 16), nn.Tanh(), nn.Linear(16, 10),
    )  # fmt: skip


def race(repeats: int = 9) -> dict[str, float] | None:
    """Median seconds of a Nyström hypergradient, k = 10, in the weights of 100 examples, hypergrad's and ours in turn.

    Ours includes one step of the inner loop, the product that measures the residual, and the report. None where
    hypergrad is not installed.
    """
    try:
        solve = import_module("hypergrad.approx_hypergrad").nystrom
    except ImportError:
        return None
    torch.manual_seed(0)
    model, weights = conv_net(), torch.ones(100)
    images, validation = torch.rand(2, 100, 1, 28, 28)
    labels, names = torch.arange(100) % 10, [name for name, _ in model.named_parameters()]
    start = {name: p.detach() for name, p in model.named_parameters()}

    def fit(params: Any, w: Tensor) -> Tensor:
        outputs = functional_call(model, params, (images,))
        return (w * F.cross_entropy(outputs, labels, reduction="none")).mean()

    def judge(params: Any) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (validation,)), labels)

    problem = BilevelProblem(
        init=lambda meta, data: start,
        inner_loss=lambda params, meta, data: fit(params, meta["weights"]),
        outer_loss=lambda params, meta, data: judge(params),
    )

    def named(params: Any) -> Any:
        return dict(zip(names, params, strict=True))

    def theirs() -> None:
        solve(
            lambda i, o: fit(named(i), o[0]),
            lambda i, o: judge(named(i)) + 0 * o[0].sum(),
            tuple(start.values()),
            (weights,),
            rank=10,
            rho=1.0,
        )

    def own() -> None:
        method = Implicit(Nystrom(rank=10, rho=1.0))
        hypergradient(
            problem, {"weights": weights}, images, inner=GradientDescent(1, lr=0.0), method=method
        )

    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(repeats + 1):
            for name, run in (("theirs", theirs), ("ours", own)):
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
    seconds = {name: median(each[1:]) for name, each in times.items()}  # the first warms up
    print(
        f"Nyström hypergradient, k = 10, conv net of 98,970: hypergrad {seconds['theirs']:.3f} s, ours "
        f"{seconds['ours']:.3f} s, ratio {seconds['ours'] / seconds['theirs']:.2f} (medians of {repeats}, in turn)"
    )
    return seconds


def main() -> list[dict[str, Any]]:
    """Run every comparison whose library is installed, and print the table."""
    eye, beta = torch.eye(N, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    slope = (
        4 * (adam(beta + 5e-5) - adam(beta - 5e-5)) / 1e-4
        - (adam(beta + 1e-4) - adam(beta - 1e-4)) / 2e-4
    ) / 3
    groups: list[
        tuple[str, Tensor, Tensor, dict[str, Callable[[], Tensor]]]
    ] = [  # what, exact, ours, theirs
        (
            f"CG, {STEPS} steps, {N}×{N}",
            torch.linalg.solve(H, V),
            ours(Implicit(CG(STEPS, tol=0.0))),
            {
                "hypergrad": lambda: hypergrad("conjugate_gradient", num_iters=STEPS, lr=1.0),
                "betty-ml": lambda: betty("cg", cg_iterations=STEPS, cg_alpha=1.0),
                "torchopt": lambda: torchopt("cg", maxiter=STEPS, rtol=0.0),
            },
        ),
        (
            f"Neumann, {STEPS + 1} terms, against them",
            polynomial(STEPS + 1),
            ours(Implicit(Neumann(STEPS + 1, scale=SCALE))),
            {
                "hypergrad": lambda: hypergrad("neumann", num_iters=STEPS, lr=SCALE),
                "betty-ml": lambda: betty("neumann", neumann_iterations=STEPS, neumann_alpha=SCALE),
                "torchopt": lambda: torchopt("ns", maxiter=STEPS, alpha=SCALE),
            },
        ),
        (
            f"Nyström of full rank, ρ = {RHO}",
            torch.linalg.solve(H + RHO * eye, V),
            ours(Implicit(Nystrom(N, RHO))),
            {"hypergrad": lambda: hypergrad("nystrom", rank=N, rho=RHO)},
        ),
        (
            "… with a dead unit",
            torch.linalg.solve(DEAD + RHO * eye, V),
            ours(Implicit(Nystrom(N, RHO)), DEAD),
            {"hypergrad": lambda: hypergrad("nystrom", DEAD, rank=N, rho=RHO)},
        ),
        (
            "Adam's derivative in β₂, 5 steps",
            slope,
            our_adam(beta),
            {"higher": lambda: higher_adam(beta)},
        ),
    ]
    rows = []
    print(f"{'relative error of':<42}{'library':<18}{'theirs':>9}{'ours':>9}")
    for what, exact, mine, theirs in groups:
        for library, call in theirs.items():
            row = _row(what, library, exact, error(mine, exact), call)
            shown = f"{'—':>9}" if row.theirs is None else f"{row.theirs:>9.1e}"
            print(f"{row.what:<42}{row.library:<18}{shown}{row.ours:>9.1e}  {row.remark}"[:160])
            rows.append(asdict(row))
    return rows


def _row(what: str, library: str, exact: Tensor, mine: float, call: Callable[[], Tensor]) -> Row:
    try:
        library = f"{library} {version(library)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = call()
    except PackageNotFoundError:
        return Row(what, library, None, mine, "not installed")
    except (RuntimeError, AttributeError, TypeError, ImportError) as problem:
        return Row(
            what, library, None, mine, f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
        )
    return Row(what, library, error(got, exact) if got.isfinite().all() else None, mine)
