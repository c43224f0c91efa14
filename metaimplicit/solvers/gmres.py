"""The generalised minimum-residual method, for systems that need not be symmetric."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from metaimplicit.options import option
from metaimplicit.solvers.arithmetic import divisor, dot, norm
from metaimplicit.solvers.base import LinearSystem, Solution, Solver
from metaimplicit.solvers.iteration import (
    Progress,
    all_ended,
    check_limits,
    final_status,
    warm_start,
)
from metaimplicit.solvers.status import Status


@dataclass(frozen=True)
class GMRES(Solver):
    """The generalised minimum-residual method (Saad & Schultz 1986), without restarts.

    K steps from zero give the x in span{b, Ab, …, A^{K−1}b} with the smallest ‖b − Ax‖, so the
    residual never grows. It keeps K + 1 vectors of the size of b. On a singular system it ends
    where the residual is smallest in that span, with the status BREAKDOWN if one is left.

    Args:
        max_steps: Steps at most, ≥ 1, with one product each. A state costs one product more, and
            so does the check of a small residual.
        tol: The relative residual at which a task has converged, ≥ 0.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> GMRES(max_steps=10).solve(Identity(b, scale=-2.0), b).value
        tensor([[-0.5000, -1.0000]])
    """

    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6
    takes_asymmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_limits("GMRES", self.max_steps, self.tol)

    def with_budget(self, products: int) -> GMRES:
        """The same solver with this many steps."""
        return replace(self, max_steps=products, tol=0.0)

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        start, r, products = warm_start(system)
        residual = norm(r)
        progress = Progress.start(residual, self.tol, products)
        arnoldi = _Arnoldi(r / divisor(residual))
        qr = _HessenbergQR(residual)
        eps = torch.finfo(r.dtype).eps
        broken = torch.zeros_like(progress.active)

        for step in range(self.max_steps):
            if all_ended(progress.active, step):
                break
            av = progress.multiply(system, arnoldi.basis[-1])
            column = arnoldi.advance(av)
            progress.record_quotient(column[:, -2:-1])

            # A column that depends on those before it adds nothing: the operator is singular.
            size = norm(column)
            singular = progress.active & ~qr.append(column, where=progress.active)
            residual = torch.where(progress.active & ~singular, qr.residual, residual)

            # With h_{k+1,k} = 0 the Krylov space does not grow any further.
            exhausted = progress.active & (column[:, -1:] <= 10 * eps * size)
            broken = broken | singular | (exhausted & (residual > self.tol))
            progress.stop(singular | exhausted | ~(residual > self.tol))

        x = start + arnoldi.combine(qr.coordinates())
        doubtful = (residual <= max(self.tol, eps**0.5)) | broken
        residual = progress.recompute_residual(
            system,
            x,
            residual,
            doubtful=doubtful,
        )
        worse_than_zero = residual > 1 + eps**0.5
        exceptions = {Status.BREAKDOWN: (broken & (residual > self.tol)) | worse_than_zero}
        return progress.solution(x, residual, final_status(residual, self.tol, exceptions))


class _Arnoldi:
    """A V_k = V_{k+1} H_k with orthonormal columns v_1 … v_{k+1} of V (Arnoldi 1951)."""

    def __init__(self, v: Tensor) -> None:
        self.basis = [v]

    def advance(self, av: Tensor) -> Tensor:
        """From A v_k to v_{k+1}. Returns column k of H, `[tasks, k + 1]`."""
        w = av
        column = []
        for v in self.basis:
            h = dot(v, w)
            w = w - h * v
            column.append(h)
        # Round-off leaves a part of the old vectors in w, which a second pass removes.
        for index, v in enumerate(self.basis):
            h = dot(v, w)
            w = w - h * v
            column[index] = column[index] + h
        beta = norm(w)
        self.basis.append(w / divisor(beta))
        return torch.cat([*column, beta], dim=1)

    def combine(self, coordinates: list[Tensor]) -> Tensor:
        """Σ_k y_k v_k, for coordinates `[tasks, 1]`."""
        total = torch.zeros_like(self.basis[0])
        for y, v in zip(coordinates, self.basis, strict=False):  # the newest v has no coordinate
            total = total + y * v
        return total


class _HessenbergQR:
    """min_y ‖ρe₁ − H y‖ for a (k+1) × k Hessenberg matrix, one column of H at a time.

    Givens rotations G make G H = R upper triangular and G ρe₁ = g. The last entry of g is the
    residual, and y = R⁻¹ g without it.
    """

    def __init__(self, residual: Tensor) -> None:
        self._g = [residual]
        self._columns: list[Tensor] = []  # of R, `[tasks, k]`
        self._cosines: list[Tensor] = []
        self._sines: list[Tensor] = []

    @property
    def residual(self) -> Tensor:
        """‖ρe₁ − H y‖, `[tasks, 1]`."""
        return self._g[-1].abs()

    def append(self, column: Tensor, where: Tensor) -> Tensor:
        """Add a column of H, `[tasks, k + 1]`, for the tasks in `where`.

        Tasks that are not there, or whose column depends on those before it, keep their y: their
        column becomes that of the identity, with g_k = 0. Returns which tasks took the column.
        """
        entries = list(column.split(1, dim=1))
        for index, (c, s) in enumerate(zip(self._cosines, self._sines, strict=True)):
            upper, lower = entries[index : index + 2]
            entries[index] = c * upper + s * lower
            entries[index + 1] = c * lower - s * upper
        upper, lower = entries[-2:]
        pivot = torch.hypot(upper, lower)
        used: Tensor = where & (pivot > torch.finfo(pivot.dtype).eps ** 0.75 * norm(column))
        c = torch.where(used, upper / divisor(pivot), 0.0)
        s = torch.where(used, lower / divisor(pivot), 1.0)
        self._cosines.append(c)
        self._sines.append(s)

        above = torch.cat([*entries[:-2], pivot], dim=1)
        unit = torch.zeros_like(above)
        unit[:, -1] = 1.0
        self._columns.append(torch.where(used, above, unit))
        g = self._g.pop()
        # Without a rotation the residual moves on as it is, and this coordinate is zero.
        self._g += [torch.where(used, c * g, 0.0), torch.where(used, -s * g, g)]
        return used

    def coordinates(self) -> list[Tensor]:
        """The solution y of R y = g by back substitution, each `[tasks, 1]`."""
        count = len(self._columns)
        y: list[Tensor] = [torch.empty(0)] * count
        for row in reversed(range(count)):
            value = self._g[row]
            for index in range(row + 1, count):
                value = value - self._columns[index][:, row : row + 1] * y[index]
            y[row] = value / self._columns[row][:, row : row + 1]
        return y
