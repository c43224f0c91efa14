"""The defaults of what users choose, and how it is written."""

from inspect import signature
from operator import attrgetter

import pytest
import torch

import metaimplicit
from metaimplicit import inner, methods, operators, optim, solvers, tuning  # noqa: F401

DEFAULTS = {
    "CG": {"max_steps": 5, "tol": 1e-06, "negative": "truncate"},
    "Dense": {"max_size": 4096, "chunk": 256},
    "FixedPoint": {"radius_steps": 10, "strict": False},
    "Forward": {"carry": False, "memory": 4294967296},
    "GradientDescent": {"steps": 5, "lr": 0.1, "momentum": 0.0},
    "Implicit": {
        "damping": 0.0,
        "products": "double-backward",
        "strict": False,
        "check_curvature": False,
    },
    "LBFGS": {"steps": 500, "tol": 1e-06, "history": 10},
    "MetaLearner": {"learn": (), "vectorize": "auto", "compile": False},
    "Neumann": {"terms": 5, "power_steps": 5},
    "NewtonCG": {"steps": 10, "cg_steps": 10, "radius": 1.0, "tol": 1e-06},
    "Nystrom": {"rank": 10, "sketch": "columns", "refresh": 1},
    "Proximal": {"center": "meta"},
    "ProximalGradient": {"steps": 100, "lr": 0.1, "accelerated": False},
    "TorchOptimizer": {"steps": 5},
    "Truncated": {"steps": 1},
    "Tuner": {"method": "cg", "warm_start": True, "on_nonfinite": "raise"},
    "Unrolled": {"memory": "graph", "iterates": False},
    "argmin": {"batched": False, "vectorize": "auto"},
    "check_hypergradient": {
        "batched": False,
        "vectorize": "auto",
        "directions": 3,
        "tolerance": 0.001,
        "seed": 0,
    },
    "hypergradient": {"batched": False, "vectorize": "auto", "compile": False},
    "root": {"batched": False, "vectorize": "vmap"},
    "inner.BoxConstraint": {"lower": -torch.inf, "upper": torch.inf},
    "inner.GroupLasso": {"strength": 1.0},
    "inner.L1Norm": {"strength": 1.0},
    "inner.KnownSolution": {},
    "inner.LinearHead": {"temperature": 1.0, "weight": "weight", "bias": "bias"},
    "inner.Newton": {"max_steps": 30, "tol": 1e-12},
    "inner.NoSteps": {},
    "inner.Ridge": {},
    "inner.SGDW": {"decoupled_weight_decay": 0.0},
    "inner.SimplexConstraint": {"total": 1.0},
    "methods.ValueFunction": {"strength": 10.0},
    "operators.Diagonal": {"samples": 10, "semidefinite": False},
    "operators.Fisher": {"expectation": "exact", "samples": 1},
    "operators.Hessian": {"products": "double-backward"},
    "operators.KroneckerFactored": {
        "expectation": "exact",
        "samples": 1,
        "corrected": False,
        "others": "raise",
        "strict": True,
    },
    "optim.GaussNewton": {"lr": 1.0, "damping": 0.01, "adapt_damping": True},
    "optim.KFAC": {
        "lr": 0.1,
        "damping": 0.01,
        "momentum": 0.9,
        "decay": 0.95,
        "update_every": 5,
        "invert_every": 20,
        "kl_clip": 0.001,
        "expectation": "monte-carlo",
        "others": "raise",
        "seed": 0,
    },
    "optim.NaturalGradient": {
        "lr": 1.0,
        "damping": 0.01,
        "adapt_damping": True,
        "expectation": "exact",
        "seed": 0,
    },
    "optim.Newton": {"lr": 1.0, "damping": 0.01, "adapt_damping": True},
    "solvers.Auto": {"max_steps": 5, "tol": 1e-06, "dense": 256, "memory": 1073741824},
    "solvers.GMRES": {"max_steps": 5, "tol": 1e-06},
    "solvers.Lanczos": {"max_steps": 5, "tol": 1e-06, "recycle": False},
    "solvers.MINRES": {"max_steps": 5, "tol": 1e-06},
    "solvers.NystromCG": {
        "rank": 10,
        "sketch": "gaussian",
        "refresh": 1,
        "max_steps": 5,
        "tol": 1e-06,
    },
    "solvers.OneStep": {"warm": True},
    "solvers.Richardson": {"steps": 1, "warm": True},
    "tuning.Augmentation": {"start": 0.1, "kinds": ("noise", "brightness", "contrast")},
    "tuning.Box": {"low": -torch.inf, "high": torch.inf},
    "tuning.ClassWeights": {"start": 1.0},
    "tuning.ExampleWeights": {"start": 1.0},
    "tuning.GroupStructure": {"strength": 0.1, "smoothing": 0.001, "seed": 0},
    "tuning.HOAG": {"schedule": "cubic", "tolerance": 0.1},
    "tuning.Interval": {"low": 0.0, "high": 1.0},
    "tuning.Simplex": {"dim": -1},
    "tuning.WeightDecay": {"scope": "scalar", "start": 0.0001, "center": "zero"},
    "tuning.WeightNetwork": {"hidden": 100, "seed": 0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_those_that_results_were_measured_with(name):
    parameters = signature(attrgetter(name)(metaimplicit)).parameters.values()
    kinds = (int, float, str, tuple)
    found = {p.name: p.default for p in parameters if isinstance(p.default, kinds)}
    assert found == DEFAULTS[name]


@pytest.mark.parametrize("kind", [solvers.Nystrom, solvers.NystromCG])
def test_the_generator_of_a_sketch_is_no_part_of_what_a_solver_is(kind):
    drawn = kind(generator=torch.Generator())
    assert drawn == kind()
    assert repr(drawn) == repr(kind())


@pytest.mark.parametrize(
    "loop",
    [inner.Ridge(), inner.Newton(), inner.NoSteps(), inner.KnownSolution({})],
    ids=lambda loop: type(loop).__name__,
)
def test_a_loop_without_gradient_steps_counts_as_one_step(loop):
    assert loop.steps == 1


def test_the_numbers_of_a_status_are_those_that_runs_have_stored():
    names = ["CONVERGED", "MAX_STEPS", "NEGATIVE_CURVATURE", "BREAKDOWN", "NON_FINITE"]
    assert [status.name for status in solvers.Status] == [*names, "NOT_STATIONARY"]
    assert [status.value for status in solvers.Status] == list(range(6))


@pytest.mark.parametrize("name", [*methods.METHODS, *inner.INNER_LOOPS])
def test_a_value_is_written_as_the_call_that_makes_it(name):
    value = methods.METHODS[name] if name in methods.METHODS else inner.INNER_LOOPS[name]()
    text = repr(value)
    names = {**vars(solvers), **vars(methods), **vars(inner), **vars(metaimplicit)}
    for rule in ("Adam", "AdamW", "RMSprop", "Adagrad"):
        optimizer = getattr(torch.optim, rule)
        text = text.replace(repr(optimizer), rule)
        names[rule] = optimizer
    rebuilt = eval(text.replace(", options={}", ""), names)  # torch's options are keywords
    assert rebuilt == value
    assert repr(rebuilt) == repr(value)
