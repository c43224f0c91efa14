"""Cases drawn from a seed: case `index` of `seed` depends on these two numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fuzz.case import ADAPTIVE, KRONECKER, SOLVED, Case


class Dice:
    """Weighted choices from a generator of its own."""

    def __init__(self, seed: int, index: int) -> None:
        self._generator = np.random.default_rng([seed, index])

    def pick(self, weights: Mapping[Any, float]) -> Any:
        """A key of `weights`, with a probability in proportion to its value."""
        values = np.array(list(weights.values()), dtype=float)
        choice = self._generator.choice(len(values), p=values / values.sum())
        return list(weights)[int(choice)]

    def any_of(self, *values: Any) -> Any:
        return self.pick(dict.fromkeys(values, 1.0))

    def chance(self, probability: float) -> bool:
        return bool(self._generator.random() < probability)


def draw(seed: int, index: int) -> Case:
    """Case `index` of `seed`."""
    dice, case = Dice(seed, index), Case(seed=seed, index=index)
    for step in (_method, _door, _network, _loss, _meta, _inner, _execution):
        case = replace(case, **step(dice, case))
    return case


def _method(dice: Dice, _: Case) -> dict[str, Any]:
    if dice.chance(0.55):
        weights = {"unrolled": 6, "forward": 3.5, "truncated": 1.5, "first-order": 1}
        method = dice.pick(weights)
        kept = dice.any_of(1, 2) if method == "truncated" else 0
        return {"method": method, "solver_steps": kept, "bare": not kept and dice.chance(0.3)}

    curvature = dice.pick(
        {
            "default": 5,
            "hessian": 4,
            "gauss-newton": 2,
            "fisher": 2,
            "kfac": 1,
            "ekfac": 0.6,
            "diagonal": 0.4,
        }
    )
    solver = dice.pick(
        {
            "dense": 4,
            "cg": 4,
            "auto": 1,
            "minres": 1,
            "lanczos": 1,
            "neumann": 1.5,
            "nystrom": 1,
            "nystrom-cg": 0.7,
            "t1-t2": 0.5,
        }
    )
    if curvature in (*KRONECKER, "diagonal"):
        solver = dice.pick({"factored": 3, "dense": 1})
    if solver == "t1-t2":
        curvature = "default"
    plain = curvature == "default" and solver != "nystrom-cg"
    flagged = plain or (curvature in KRONECKER and solver == "factored")
    many = 20 if solver == "neumann" else 150  # its oracle is the polynomial of as many terms
    few = solver in ("cg", "minres", "neumann") and dice.chance(0.55)
    products = {"double-backward": 3, "forward-over-reverse": 1, "finite-differences": 1}
    kronecker = solver == "cg" and curvature in ("hessian", "gauss-newton") and dice.chance(0.2)
    bare = solver == "t1-t2" or (flagged and dice.chance(0.3))
    chosen = {
        "method": "implicit",
        "solver": solver,
        "curvature": curvature,
        "bare": bare,
        "solver_steps": dice.any_of(1, 2, 3) if few else many,
        "scale": dice.any_of(0.05, 0.1) if solver == "neumann" else 0.0,
        "rho": dice.any_of(0.01, 0.1) if solver in ("nystrom", "nystrom-cg", "factored") else 0.0,
        "damping": dice.pick({0.0: 5, 0.1: 1}),
        "products": dice.pick(products) if curvature == "hessian" else "double-backward",
        "preconditioner": "kfac" if kronecker and not few else "none",
    }
    # a flag's own numbers; a scale of 0 is one that the solver finds, a rho of 0 is its default
    scale = 1.0 if solver == "t1-t2" else 0.0
    return chosen | (
        {"solver_steps": 5, "scale": scale, "rho": 0.0, "damping": 0.0} if bare else {}
    )


def _door(dice: Dice, case: Case) -> dict[str, Any]:
    # argmin has no report to say that a solver with a scale or a sketch of its own is not done
    reports = case.bare and case.solver in ("neumann", "nystrom")
    door = dice.pick({"learner": 5, "hypergradient": 4, "argmin": 0 if reports else 1})
    batched = door == "learner" or dice.chance(0.6)
    hessian = case.matrix == "hessian" and case.preconditioner == "none"
    plain = hessian or not case.implicit
    return {
        "door": door,
        "form": "function" if door != "learner" and plain and dice.chance(0.5) else "composite",
        "batched": batched,
        "tasks": dice.any_of(1, 2, 3) if batched else 1,
        "examples": dice.any_of(5, 6),
    }


def _network(dice: Dice, case: Case) -> dict[str, Any]:
    model = dice.pick(
        {
            "linear": 3,
            "mlp": 6,
            "conv": 4,
            "embedding": 3,
            "tagger": 1,
            "tied": 1.5,
            "spare": 1,
            "attention": 0.3,
            "encoder": 0.3,
            "dot-product": 0.3,
            "lstm": 0.4,
            "gru": 0.4,
        }
    )
    # batch statistics couple the examples, for which K-FAC has no one definition
    coupled = () if case.curvature in KRONECKER else ("batch", "project-batch")
    norms = {
        "conv": ("none", "group", "eval-batch", *coupled),
        "mlp": ("none", "none", "none", "layer"),
    }
    # differences of a gradient across a kink of ReLU are those of its jump
    kinked = case.products != "finite-differences"
    activation = dice.pick({"tanh": 6, "softplus": 1, "gelu": 1, "relu": kinked})
    return {
        "model": model,
        "norm": dice.any_of(*norms.get(model, ("none",))),
        "activation": activation if model in norms else "tanh",
        "padding": model == "embedding" and dice.chance(0.5),
        "dropout": model == "mlp" and dice.chance(0.08),
        "frozen": dice.chance(0.12),
        "adapt": "head" if case.door == "learner" and dice.chance(0.12) else "all",
    }


def _loss(dice: Dice, case: Case) -> dict[str, Any]:
    losses = {"cross-entropy": 8, "nll": 3, "mse": 5, "bce": 2, "smooth-l1": 1, "poisson": 1}
    loss = dice.pick(losses)
    learner = case.door == "learner"
    ignored = {"ignore": 0.15 if learner else 1.5, "ignore-class": 0.8}
    variants = {
        "cross-entropy": {"plain": 6, "smoothing": 1, "weights": 1, "sum": 0.7, **ignored},
        "nll": {"plain": 5, "weights": 0.7, "sum": 0.5, **ignored},
        "mse": {"plain": 6, "sum": 1},
        "bce": {"plain": 4, "weights": 1},
    }
    variant = dice.pick(variants.get(loss, {"plain": 1}))
    user = variant == "plain" and dice.chance(0.25)
    forms = ("user", "user-module") if user else ("function", "module")
    classes = loss in ("cross-entropy", "nll")
    small = classes and variant != "ignore" and case.model != "tagger"  # what torch takes as uint8
    return {
        "loss": loss,
        "variant": variant,
        "loss_form": dice.any_of(*forms),
        "log_softmax": loss == "nll",
        "outputs": 3 if classes else dice.any_of(1, 2),
        "labels": "uint8" if small and dice.chance(0.03) else "int64",
    }


def _meta(dice: Dice, case: Case) -> dict[str, Any]:
    if case.door == "learner":
        extra = {"proximal": 0.6} if case.implicit else {"lr": 0.6 * (case.method != "first-order")}
        meta = dice.pick({"start": 6, **extra})
    elif case.method == "first-order":
        meta = "start"
    else:
        # a gain on the outputs would leave them no log-probabilities
        gain = 0 if case.log_softmax else 2
        meta = dice.pick({"start": 4, "decay": 2, "gain": gain, "lr": not case.implicit})
    required = case.implicit or meta in ("decay", "proximal")
    proximal = dice.any_of(0.5, 1.0, 2.0) if required or dice.chance(0.25) else 0.0
    singular = case.implicit and meta == "gain" and dice.chance(0.3)
    return {"meta": meta, "proximal": 0.0 if singular else proximal}


def _inner(dice: Dice, case: Case) -> dict[str, Any]:
    weights = {"GradientDescent": 10, "SGD": 4, "Adam": 2, "AdamW": 1}
    if case.implicit and case.door == "hypergradient":
        weights |= {"LBFGS": 1.5, "NewtonCG": 1.5}
    if case.method != "truncated":
        weights |= {"RMSprop": 0.7, "Adagrad": 0.7, "Adadelta": 0.4, "Adamax": 0.4, "ASGD": 0.4}
    inner = dice.pick(weights)
    decay = ("weight_decay", dice.any_of(0.1, 0.3))
    options: list[tuple[str, Any]] = [decay] if dice.chance(0.35) else []
    if inner in SOLVED:
        return {"inner": inner, "steps": 100 if inner == "LBFGS" else 40, "options": ()}

    if inner == "GradientDescent":
        options = [("momentum", 0.5)] if dice.chance(0.3) else []
    elif inner == "SGD" and dice.chance(0.5):
        kind = dice.any_of(("nesterov", False), ("nesterov", True), ("dampening", 0.2))
        options += [("momentum", 0.5), kind]
    elif inner == "ASGD":
        options = [("lambd", 0.2)] if dice.chance(0.5) else options
    steps = max(dice.any_of(1, 2, 3, 4, 5), 0 if case.implicit else case.solver_steps)
    lr = {"Adadelta": 1.0}.get(inner, 0.05 if inner in ADAPTIVE else 0.1)
    if case.implicit and inner == "AdamW":
        options, steps, lr = [("weight_decay", dice.any_of(0.3, 0.6))], 200, 0.02
    elif case.implicit and inner in ("GradientDescent", "SGD") and dice.chance(0.6):
        steps, lr = 100, 0.3 if case.classes else 0.15
    delicate = case.variant == "sum" or (
        steps > 10 and case.norm in ("layer", "batch", "project-batch")
    )
    return {
        "inner": inner,
        "steps": steps,
        "lr": min(lr, 0.03) if delicate else lr,
        "options": tuple(options),
        "proximal": max(case.proximal, 1.0) if steps > 10 and case.proximal else case.proximal,
    }


def _execution(dice: Dice, case: Case) -> dict[str, Any]:
    long = case.steps > 10
    timed = case.door == "learner" and not long
    vectorize = dice.pick({"vmap": 5, "loop": 4, "auto": 1.5 * timed})
    # a long loop may pass a saddle point, where float32 and float64 part
    delicate = long or case.inner in (*ADAPTIVE, *SOLVED, "ASGD")
    delicate = delicate or case.products == "finite-differences"
    changes = {
        "vectorize": vectorize if case.batched else "loop",
        "chunk": 1 if vectorize == "vmap" and case.tasks > 1 and dice.chance(0.1) else 0,
        "dtype": "float32" if not delicate and dice.chance(0.12) else "float64",
    }
    if long:
        changes["tasks"] = min(case.tasks, 2)
    if case.inner == "AdamW" and case.implicit:  # what settles
        changes |= {"tasks": 1, "norm": "none", "activation": "tanh", "chunk": 0}
    if case.dropout:  # one order of random draws alone: one task, no vmap
        changes |= {"tasks": 1, "vectorize": "loop", "chunk": 0, "dtype": "float64"}
    return changes
