"""The largest relative errors that still count as right, in one table.

The error of a hypergradient h against an oracle's h* is ‖h − h*‖/‖h*‖ over all meta-parameters, and
for finite differences |hᵀd − slope|/max(|slope|, ‖h‖) along a unit direction d. A denominator is
at least `SMALLEST`: losses are of order 1, and hypergradients far below it are what is left of
terms that cancel, known to the round-off of the terms. A tolerance is
`fixed + condition · slope`, where `condition` is the condition number κ of the linear system
(0 if the case solves none). It was fixed before the first run; a change needs a derivation.

With ε = 2.2e-16 (float64) or 1.2e-7 (float32):

- A hypergradient of a small case is a chain of some 10³ operations, with 5 steps or a contraction
  behind it. Their rounding errors add up to about 10³ ε. Normalisations over few examples amplify
  them by up to 1/√(var + 1e-5) ≤ 300, and a sum of cancelling terms by as much again. Hence
  3e4 ε to 1e6 ε: 1e-9 in float64 leaves room for both, 2e-3 in float32 for the first.
- An adaptive optimiser divides by √v + 1e-8. Where a gradient is mathematically zero (a bias
  before a normalisation, an attention's key bias), its rounding error of 1e-17 is amplified by
  the slope 1e8 of that quotient: 1e-9 of each such coordinate, and 1e-7 over a chain of steps.
- A direct solve loses κ ε, with a constant of the order n ≤ 60: 1e2 ε κ, rounded up.
- A Krylov solver stops at the relative residual τ, which changes the solution by at most κ τ.
  The fuzzer gives it τ = 1e-12 in float64 and 1e-6 in float32; a bare flag has the default 1e-6.
- Nyström's sketch drops directions below √(n ε) ≈ 1e-7 of the largest: an error of 1e-7 κ.
- A difference of gradients with the step ε^⅓ has the relative error ε^⅔ ≈ 4e-11 times the third
  derivatives and (1 + ‖θ‖)², up to 1e3 together: 4e-8 for the product, and as much times κ once
  it is inverted. A normalisation divides by a standard deviation s, so each derivative has
  another 1/s. In the fuzzer's small layers the smallest s of a batch is 0.2 in the median, and 0.3
  in the case that showed this: 1/s² ≥ 10 between the first derivative of a gradient and the third.
- The fuzzer's finite differences are extrapolated from the steps h = 1e-3 and h/2, whose slopes
  must agree to 1e-4 of the scale. The extrapolation removes that error of order h², and leaves
  one of order h⁴: h² = 1e-6 times 1e-4, times a constant of 1e3 for the fifth derivative beside
  the third. Cancellation leaves 1e-16/h = 1e-13. Where a kink lies within the steps, the
  extrapolation removes nothing, and the error is as large as the disagreement itself, which is
  added to the tolerance. Hence 1e-6 for the path, which is reproduced
  exactly, and 1e-5 for the argmin: the loop there ends at the distance δ ≤ 1e-7 from it, which
  changes the hypergradient by a third derivative times κ δ.
- AdamW's loop creeps for as long as its second moments decay. Finite differences of it at T/2 and
  T steps differ by a drift, here in the place of `condition`. An implicit value stands for the end
  of the loop, and is right if it is no further from the differences at T than they drifted in the
  second half, and 1 % for what they are short of settled along the direction.
- A long loop that amplifies a nudge of θ₀ by more than `AMPLIFICATION` is no case to judge:
  the same steps, rounded otherwise, then end up to 1e3 ε apart for each step of the loop.
- An adaptive optimiser at a gradient below its 1e-8, on which a penalty acts, is none either.
- A loop that is solved rather than stepped through (L-BFGS, Newton's method) is differentiated at
  the θ that the call returned, so its distance from the argmin does not enter.
"""

from __future__ import annotations

from typing import NamedTuple

SMALLEST = 1e-3
AMPLIFICATION = 1e3
ZERO_GRADIENT = 1e-8
DIFFERENCE_STEP = 1e-3
DIFFERENCE_AGREEMENT = 1e-4
ARGMIN_DISTANCE = 1e-7
UNDECIDABLE = 0.05  # an oracle with a larger tolerance than this decides nothing
CONFLICT = 0.01  # an oracle this much finer than another's error must see that error, too
DRIFT = 0.1  # of finite differences from T/2 to T steps; more is no settled loop
SINGULAR = 1e-12  # eigenvalues below this share of the largest count as zero


class Tolerance(NamedTuple):
    """`fixed + condition · slope`."""

    fixed: float
    slope: float = 0.0

    def at(self, condition: float) -> float:
        return self.fixed + condition * self.slope


TABLE: dict[tuple[str, str, str], Tolerance] = {
    # the plain loop, and the outer loss at θ_T
    ("float64", "loop", "plain"): Tolerance(1e-9),
    ("float64", "loop", "adaptive"): Tolerance(1e-7),
    ("float32", "loop", "plain"): Tolerance(2e-3),
    # finite differences of the T steps, and of the argmin
    ("float64", "differences", "path"): Tolerance(1e-6),
    ("float64", "differences", "argmin"): Tolerance(1e-5, 1e-7),
    ("float32", "differences", "path"): Tolerance(2e-3),
    ("float32", "differences", "argmin"): Tolerance(2e-3, 1e-5),
    ("float64", "differences", "settled"): Tolerance(1e-2, 1.0),
    # the dense formula, by how the system is solved
    ("float64", "formula", "direct"): Tolerance(1e-9, 3e-14),
    ("float64", "formula", "krylov"): Tolerance(1e-9, 2e-12),
    ("float64", "formula", "loose krylov"): Tolerance(1e-9, 2e-6),
    ("float64", "formula", "polynomial"): Tolerance(1e-9, 3e-14),
    ("float64", "formula", "sketch"): Tolerance(1e-9, 1e-7),
    ("float64", "formula", "difference products"): Tolerance(4e-8, 4e-8),
    ("float64", "formula", "normalised difference products"): Tolerance(4e-7, 4e-7),
    ("float32", "formula", "direct"): Tolerance(2e-3, 1e-5),
    ("float32", "formula", "krylov"): Tolerance(2e-3, 1e-5),
    ("float32", "formula", "loose krylov"): Tolerance(2e-3, 1e-5),
    ("float32", "formula", "polynomial"): Tolerance(2e-3, 1e-5),
    ("float32", "formula", "sketch"): Tolerance(2e-3, 5e-3),
}
