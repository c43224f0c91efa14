"""The call under test: a case handed to metaimplicit, as a user would write it."""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import metaimplicit
from fuzz.case import SOLVED, Case
from fuzz.losses import build_loss
from fuzz.models import build_model
from fuzz.problems import Values, draw_data, initial_meta, is_head
from metaimplicit import solvers
from metaimplicit.models import BatchNorm
from metaimplicit.operators import Diagonal, Fisher

PACKAGE = str(Path(metaimplicit.__file__).parent)
NOISE = ("performance drop", "deprecated", "torch.jit")  # warnings of torch about itself


@dataclass
class Outcome:
    """What a call returned, or how it ended.

    Attributes:
        grads: the hypergradient by name, float64; None if the call raised.
        loss: the outer loss, if the call returns one.
        params: θ of each task, if the call returns them.
        flags: what the call said against its own result.
        error: the exception.
        refusal: whether the exception is the project's own and says what to do.
    """

    grads: Values | None = None
    loss: float | None = None
    params: list[Values] | None = None
    flags: list[str] = field(default_factory=list)
    error: Exception | None = None
    refusal: bool = False


def call(case: Case) -> Outcome:
    """Run a case.

    A result is flagged if a warning was issued, other than torch's about itself, or if the report
    has a status other than CONVERGED for one of the tasks. Two things are no flag, since they
    excuse nothing: a θ that is not stationary, where the oracles differentiate at the same θ; and
    MAX_STEPS where an oracle has what the solver's steps give by their definition.
    """
    torch.manual_seed(case.index)
    door = {"learner": _learner, "hypergradient": _hypergradient, "argmin": _argmin}[case.door]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome, report = door(case)
        except Exception as error:  # whatever a user would see
            return Outcome(error=error, refusal=_is_refusal(error))
    texts = [str(warning.message) for warning in caught]
    outcome.flags += [text for text in texts if not any(noise in text for noise in NOISE)]
    if report is not None and report.status is not None:
        names = {solvers.Status(int(s)).name for s in report.status}
        excused = {"CONVERGED"}
        if case.decoupled_decay == 0:
            excused.add("NOT_STATIONARY")
        if _is_reproduced(case) and case.decoupled_decay == 0:
            excused.add("MAX_STEPS")
        outcome.flags += sorted(names - excused)
    return outcome


def _is_reproduced(case: Case) -> bool:
    """Whether the formula's oracle has the K-th iterate, polynomial or damped inverse itself.

    It has no scale that Neumann finds, no sampled columns, and no noise of difference products.
    """
    if case.solver == "neumann":
        return case.scale > 0
    noisy = case.products == "finite-differences"
    return case.solver not in ("nystrom", "nystrom-cg") or not (case.bare or noisy)


def _is_refusal(error: Exception) -> bool:
    """Whether the last frame is a `raise` of the project with a message that says what to do."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    stated = any(word in str(error) for word in ("expected", "use ", ";"))
    return frame.filename.startswith(PACKAGE) and line.startswith("raise ") and stated


def _learner(case: Case) -> tuple[Outcome, Any]:
    model, loss = _model_and_loss(case)
    learner = metaimplicit.MetaLearner(
        model,
        loss,
        inner=_inner(case, case.lr),
        method=_method(case, _adapted_size(case, model)),
        proximal=case.proximal,
        learn=(case.meta,) if case.meta in ("lr", "proximal") else (),
        adapt=is_head if case.adapt == "head" else None,
        vectorize=case.vectorize,
        chunk_size=case.chunk or None,
    )
    inputs, targets, query_inputs, query_targets = _data(case)
    support, query = (inputs, targets), (query_inputs, query_targets)
    step = learner.backward(SimpleNamespace(support=support, query=query))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = {n: p.grad for n, p in (trainable | dict(learner.learnt)).items()}
    return Outcome(grads=_double(grads), loss=float(step.loss)), step.report


def _hypergradient(case: Case) -> tuple[Outcome, Any]:
    model, loss = _model_and_loss(case)
    problem, data, how = _problem(case, model, loss)
    meta = initial_meta(case, model)
    result = metaimplicit.hypergradient(problem, meta, data, **how)
    params = [result.params]
    if case.batched:
        params = [{n: p[i] for n, p in result.params.items()} for i in range(case.tasks)]
    outcome = Outcome(
        grads=_double(result.grads),
        loss=float(result.outer_loss),
        params=[_double(p) for p in params],
    )
    return outcome, result.report


def _argmin(case: Case) -> tuple[Outcome, Any]:
    model, loss = _model_and_loss(case)
    problem, data, how = _problem(case, model, loss)
    meta = {n: m.clone().requires_grad_() for n, m in initial_meta(case, model).items()}
    params = metaimplicit.argmin(problem.inner_loss, problem.init, meta, data, **how)
    if not case.batched:
        total = problem.outer_loss(params, meta, data)
    else:
        rows = [
            problem.outer_loss(
                {n: p[i] for n, p in params.items()}, meta, [part[i] for part in data]
            )
            for i in range(case.tasks)
        ]
        total = torch.stack(rows).mean()
    total.backward()
    grads = {n: torch.zeros_like(m) if m.grad is None else m.grad for n, m in meta.items()}
    return Outcome(grads=_double(grads), loss=float(total)), None


def _model_and_loss(case: Case) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    dtype = getattr(torch, case.dtype)
    return build_model(case, dtype, BatchNorm), build_loss(case, dtype)


def _data(case: Case) -> list[Tensor]:
    dtype = getattr(torch, case.dtype)
    parts = [p.to(dtype) if p.is_floating_point() else p for p in astuple(draw_data(case))]
    if case.labels != "int64":
        parts[1::2] = [labels.to(getattr(torch, case.labels)) for labels in parts[1::2]]
    return parts if case.batched else [p.squeeze(0) for p in parts]


def _problem(
    case: Case, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[metaimplicit.BilevelProblem, Any, dict[str, Any]]:
    """The problem, its data, and the keywords of `hypergradient`."""
    start = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def call(params: Values, meta: Values, inputs: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, params, (inputs,))
        return outputs * meta["gain"] if case.meta == "gain" else outputs

    def inner_loss(params: Values, meta: Values, data: Any) -> Tensor:
        value = loss(call(params, meta, data[0]), data[1])
        return value if penalty is None else value + penalty(params, meta)

    penalty = _penalty(case)
    composite = metaimplicit.Composite(
        outputs=lambda params, meta, data: call(params, meta, data[0]),
        loss=lambda outputs, data: loss(outputs, data[1]),
        penalty=penalty,
        module=model,
    )
    problem = metaimplicit.BilevelProblem(
        init=lambda meta, data: {name: meta.get(name, p) for name, p in start.items()},
        inner_loss=composite if case.form == "composite" else inner_loss,
        outer_loss=lambda params, meta, data: loss(call(params, meta, data[2]), data[3]),
    )
    lr = metaimplicit.FromMeta("log_lr", torch.exp) if case.meta == "lr" else case.lr
    how = {
        "inner": _inner(case, lr),
        "method": _method(case, _adapted_size(case, model)),
        "batched": case.batched,
        "vectorize": case.vectorize,
        "chunk_size": case.chunk or None,
    }
    return problem, tuple(_data(case)), how


def _penalty(case: Case) -> Callable[[Values, Values], Tensor] | None:
    center = "meta" if case.meta == "start" else "zero"
    if case.meta == "decay":
        strength = metaimplicit.FromMeta("log_decay", torch.exp)
        return metaimplicit.Proximal(strength, center=center)
    return metaimplicit.Proximal(case.proximal, center=center) if case.proximal else None


def _inner(case: Case, lr: Any) -> Any:
    options = dict(case.options)
    if case.inner == "GradientDescent":
        return metaimplicit.GradientDescent(steps=case.steps, lr=lr, **options)
    if case.inner in SOLVED:
        return getattr(metaimplicit, case.inner)(steps=case.steps, tol=1e-7)
    optimizer = getattr(torch.optim, case.inner)
    return metaimplicit.TorchOptimizer(optimizer, steps=case.steps, lr=lr, **options)


def _method(case: Case, size: int) -> Any:
    """The method, or its flag."""
    if case.bare:
        return case.curvature if case.solver == "factored" else _flag(case)
    if case.method == "truncated":
        return metaimplicit.Truncated(steps=case.solver_steps)
    if not case.implicit:
        paths = {"unrolled": "Unrolled", "forward": "Forward", "first-order": "FirstOrder"}
        return getattr(metaimplicit, paths[case.method])()
    curvatures = {"default": None, "fisher": Fisher, "diagonal": partial(Diagonal, samples=None)}
    return metaimplicit.Implicit(
        _solver(case, size),
        curvature=curvatures.get(case.curvature, case.curvature),
        damping=case.damping,
        preconditioner=None if case.preconditioner == "none" else case.preconditioner,
        products=case.products,
    )


def _flag(case: Case) -> str:
    return case.solver if case.implicit else case.method


def _solver(case: Case, size: int) -> solvers.Solver:
    steps, tol = case.solver_steps, 1e-12 if case.dtype == "float64" else 1e-6
    makers: dict[str, Callable[[], solvers.Solver]] = {
        "dense": lambda: solvers.Dense(),
        "cg": lambda: solvers.CG(max_steps=steps, tol=tol),
        "auto": lambda: solvers.Auto(max_steps=steps, tol=tol),
        "minres": lambda: solvers.MINRES(max_steps=steps, tol=tol),
        "lanczos": lambda: solvers.Lanczos(max_steps=steps, tol=tol),
        "neumann": lambda: solvers.Neumann(terms=steps, scale=case.scale),
        "nystrom": lambda: solvers.Nystrom(rank=size, rho=case.rho),
        "nystrom-cg": lambda: solvers.NystromCG(
            rank=max(1, size // 2), rho=case.rho, max_steps=steps, tol=tol
        ),
        "factored": lambda: solvers.Factored(rho=case.rho),
    }
    return makers[case.solver]()


def _adapted_size(case: Case, model: nn.Module) -> int:
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return sum(p.numel() for n, p in trainable.items() if case.adapt == "all" or is_head(n))


def _double(values: Values) -> Values:
    return {name: value.detach().double() for name, value in values.items()}
