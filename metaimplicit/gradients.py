"""Meta-gradients that mean nothing."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from metaimplicit.methods import Report
from metaimplicit.params import Params
from metaimplicit.solvers import Status


def warn_if_useless(gradients: Params, report: Report | None = None) -> None:
    """Warn if a meta-gradient is not finite, or too large to mean anything.

    At a norm above 1/ε, where ε is the relative round-off of its type (that of float32 for shorter
    types), a change of φ by round-off changes the loss by more than one.

    Args:
        gradients: The meta-gradient, `{name: tensor}`. Entries that are not floating-point count
            as zero.
        report: The report of the method. If its solver has said that numbers are not finite, there
            is no second warning.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_if_useless({"weight": torch.tensor([float("nan")])})
        >>> str(caught[0].message).split(";")[0]
        "the meta-gradient of 'weight' is not finite (NaN in the data?)"
    """
    gradients = {name: _entries(g) for name, g in gradients.items() if g.is_floating_point()}
    if not gradients or any(g.is_meta for g in gradients.values()):
        return  # they hold no numbers
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    types = {torch.float32, *(g.dtype for g in gradients.values())}
    eps = min(torch.finfo(dtype).eps for dtype in types)
    if norm <= 1 / eps:
        return
    if report is not None and report.share(Status.NON_FINITE) > 0:
        return
    wrong = [name for name, g in gradients.items() if not bool(g.isfinite().all())]
    names = ", ".join(map(repr, wrong[:3])) + (", …" if len(wrong) > 3 else "")
    what = f"of {names} is not finite (NaN in the data?)" if wrong else f"has the norm {norm:.1e}"
    # Between here and the caller of `hypergradient` are its decorators.
    warnings.warn(
        f"the meta-gradient {what}; lower the inner step size, take fewer inner steps or a larger "
        "eps of the inner optimiser, or add damping or proximal",
        RuntimeWarning,
        stacklevel=6,
    )


def _entries(gradient: Tensor) -> Tensor:
    """Those that a sparse tensor holds, since torch before 2.9 has no norm of one."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
