"""Solvers and derivatives of public libraries beside ours, held against exact values.

Libraries that are not installed are left out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from peer_libraries import (
    ADAM_STEPS,
    DEAD_UNIT_H,
    IDENTITY,
    RHO,
    SCALE,
    SIZE,
    STEPS,
    H,
    V,
    adam_slope,
    betty,
    higher_adam_slope,
    hypergrad,
    inner_loss,
    neumann_polynomial,
    torchopt,
)
from torch import Tensor, nn
from torch.func import functional_call

from metaimplicit import (
    CG,
    BilevelProblem,
    FromMeta,
    GradientDescent,
    Implicit,
    Neumann,
    Nystrom,
    TorchOptimizer,
    Unrolled,
    hypergradient,
)
from metaimplicit.methods import Method
from metaimplicit.params import Params


@dataclass(frozen=True)
class Row:
    """One value by a library and by us.

    Attributes:
        what: What is computed.
        library: The library, with its version.
        ours: Our relative error.
        theirs: The library's relative error, or None if it gave no finite value.
        remark: Why the library gave no value.
    """

    what: str
    library: str
    ours: float
    theirs: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Quantity:
    """What is compared.

    Attributes:
        what: What is computed.
        exact: Its exact value.
        ours: Our value.
        theirs: A function that computes the value, for each library.
    """

    what: str
    exact: Tensor
    ours: Tensor
    theirs: dict[str, Callable[[], Tensor]]


def compare_errors() -> list[dict[str, Any]]:
    """The rows of all quantities as dictionaries. Prints a table of them."""
    print(f"{'relative error of':<42}{'library':<18}{'theirs':>9}{'ours':>9}")
    rows = []
    for quantity in quantities():
        for library, compute in quantity.theirs.items():
            row = compare_with(library, compute, quantity)
            theirs = "—" if row.theirs is None else f"{row.theirs:.1e}"
            line = f"{row.what:<42}{row.library:<18}{theirs:>9}{row.ours:>9.1e}  {row.remark}"
            print(line[:160])
            rows.append(asdict(row))
    return rows


def quantities() -> list[Quantity]:
    """H⁻¹v by CG, by Neumann's series and by Nyström; a derivative of Adam."""
    beta = torch.tensor(0.9, dtype=torch.float64)
    return [
        Quantity(
            what=f"CG, {STEPS} steps, {SIZE}×{SIZE}",
            exact=torch.linalg.solve(H, V),
            ours=our_hypergradient(Implicit(CG(STEPS, tol=0.0))),
            theirs={
                "hypergrad": lambda: hypergrad("conjugate_gradient", num_iters=STEPS, lr=1.0),
                "betty-ml": lambda: betty("cg", cg_iterations=STEPS, cg_alpha=1.0),
                "torchopt": lambda: torchopt("cg", maxiter=STEPS, rtol=0.0),
            },
        ),
        # The others do not count the first term as an iteration.
        Quantity(
            what=f"Neumann, {STEPS + 1} terms",
            exact=neumann_polynomial(STEPS + 1),
            ours=our_hypergradient(Implicit(Neumann(STEPS + 1, scale=SCALE))),
            theirs={
                "hypergrad": lambda: hypergrad("neumann", num_iters=STEPS, lr=SCALE),
                "betty-ml": lambda: betty("neumann", neumann_iterations=STEPS, neumann_alpha=SCALE),
                "torchopt": lambda: torchopt("ns", maxiter=STEPS, alpha=SCALE),
            },
        ),
        Quantity(
            what=f"Nyström of full rank, ρ = {RHO}",
            exact=torch.linalg.solve(H + RHO * IDENTITY, V),
            ours=our_hypergradient(Implicit(Nystrom(SIZE, RHO))),
            theirs={"hypergrad": lambda: hypergrad("nystrom", rank=SIZE, rho=RHO)},
        ),
        Quantity(
            what="… with a dead unit",
            exact=torch.linalg.solve(DEAD_UNIT_H + RHO * IDENTITY, V),
            ours=our_hypergradient(Implicit(Nystrom(SIZE, RHO)), DEAD_UNIT_H),
            theirs={"hypergrad": lambda: hypergrad("nystrom", DEAD_UNIT_H, rank=SIZE, rho=RHO)},
        ),
        Quantity(
            what=f"Adam's derivative in β₂, {ADAM_STEPS} steps",
            exact=adam_slope(beta),
            ours=our_adam_slope(beta),
            theirs={"higher": lambda: higher_adam_slope(beta)},
        ),
    ]


def compare_with(library: str, compute: Callable[[], Tensor], quantity: Quantity) -> Row:
    """The row of a library. What it raises is the remark."""
    ours = relative_error(quantity.ours, quantity.exact)
    try:
        library = f"{library} {version(library)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = compute()
    except PackageNotFoundError:
        return Row(quantity.what, library, ours=ours, remark="not installed")
    except (RuntimeError, AttributeError, TypeError, ImportError) as error:
        remark = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Row(quantity.what, library, ours=ours, remark=remark)
    theirs = relative_error(value, quantity.exact) if value.isfinite().all() else None
    return Row(quantity.what, library, ours=ours, theirs=theirs)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖/‖exact‖."""
    return float((value - exact).norm() / exact.norm())


def our_hypergradient(method: Method, h: Tensor = H) -> Tensor:
    """Our hypergradient of this problem at θ = φ = 0, `[n]`."""
    zero = torch.zeros(SIZE, dtype=torch.float64)
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": zero},
        inner_loss=lambda params, meta, data: inner_loss(params["theta"], meta["phi"], h),
        outer_loss=lambda params, meta, data: V @ params["theta"],
    )
    with warnings.catch_warnings():
        # With a dead unit A is singular, and the solve of A + ρI warns of it.
        warnings.simplefilter("ignore")
        result = hypergradient(
            problem,
            {"phi": zero},
            V,
            inner=GradientDescent(steps=1, lr=0.0),
            method=method,
        )
    return result.grads["phi"]


def our_adam_slope(beta: Tensor) -> Tensor:
    """The derivative of V·θ after our steps of Adam in β₂ = `beta`, by unrolling; a scalar."""
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.ones(SIZE, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: inner_loss(params["theta"], V),
        outer_loss=lambda params, meta, data: V @ params["theta"],
    )
    betas = (0.9, FromMeta("beta"))
    adam = TorchOptimizer(torch.optim.Adam, steps=ADAM_STEPS, lr=0.1, betas=betas)
    result = hypergradient(problem, {"beta": beta}, V, inner=adam, method=Unrolled())
    return result.grads["beta"]


def conv_net() -> nn.Module:
    """A network of 98,970 parameters from 28×28 images to 10 scores.

    It is smooth: with a dead unit among those sampled, the solve of hypergrad is singular.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(64, 96, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(1536, 16),
        nn.Tanh(),
        nn.Linear(16, 10),
    )


def compare_seconds(repeats: int = 9) -> dict[str, float] | None:
    """Median seconds of a Nyström hypergradient by hypergrad ("theirs") and by us ("ours").

    It has 10 columns. The meta-parameters are the weights of 100 examples. The two take turns. Our
    time includes one step of the inner loop, the product for the residual, and the report.

    Returns:
        The seconds, or None if hypergrad is not installed.
    """
    try:
        solve = import_module("hypergrad.approx_hypergrad").nystrom
    except ImportError:
        return None
    torch.manual_seed(0)
    model = conv_net()
    weights = torch.ones(100)
    images, validation_images = torch.rand(2, 100, 1, 28, 28)
    labels = torch.arange(100) % 10
    start = {name: p.detach() for name, p in model.named_parameters()}

    def training_loss(params: Params, weights: Tensor) -> Tensor:
        scores = functional_call(model, params, (images,))
        return (weights * F.cross_entropy(scores, labels, reduction="none")).mean()

    def validation_loss(params: Params) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (validation_images,)), labels)

    def named(params: Sequence[Tensor]) -> Params:
        return dict(zip(start, params, strict=True))

    def run_theirs() -> None:
        solve(
            lambda params, meta: training_loss(named(params), meta[0]),
            lambda params, meta: validation_loss(named(params)) + 0 * meta[0].sum(),
            tuple(start.values()),
            (weights,),
            rank=10,
            rho=1.0,
        )

    problem = BilevelProblem(
        init=lambda meta, data: start,
        inner_loss=lambda params, meta, data: training_loss(params, meta["weights"]),
        outer_loss=lambda params, meta, data: validation_loss(params),
    )

    def run_ours() -> None:
        hypergradient(
            problem,
            {"weights": weights},
            images,
            inner=GradientDescent(steps=1, lr=0.0),
            method=Implicit(Nystrom(rank=10, rho=1.0)),
        )

    seconds = median_seconds({"theirs": run_theirs, "ours": run_ours}, repeats)
    print(
        f"Nyström hypergradient, k = 10, conv net of 98,970: hypergrad {seconds['theirs']:.3f} s, "
        f"ours {seconds['ours']:.3f} s, ratio {seconds['ours'] / seconds['theirs']:.2f} "
        f"(medians of {repeats}, in turn)"
    )
    return seconds


def median_seconds(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The median seconds of calls that take turns. A first round, which warms up, is left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(repeats + 1):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
    return {name: median(measured[1:]) for name, measured in times.items()}
