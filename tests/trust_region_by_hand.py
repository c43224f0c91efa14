"""Trust-region steps written out for one task (Nocedal & Wright 2006, Chapters 4 and 7)."""

import torch

DOUBLE = torch.float64


def boundary(s, d, radius):
    """The positive root of ‖s + τd‖² = Δ² by the eigenvalues of the companion matrix."""
    a = float(d @ d)
    b = float(2 * s @ d)
    c = float(s @ s - radius**2)
    companion = torch.tensor([[0.0, -c / a], [1.0, -b / a]], dtype=DOUBLE)
    return float(torch.linalg.eigvals(companion).real.max())


def steihaug(g, h, radius, tol, steps):
    """Algorithm 7.2: the step, and whether it is at the boundary."""
    z = torch.zeros_like(g)
    r = g.clone()
    d = -g
    for _ in range(steps):
        if float(d @ h @ d) <= 0:
            return z + boundary(z, d, radius) * d, True
        alpha = float(r @ r) / float(d @ h @ d)
        if float((z + alpha * d).norm()) >= radius:
            return z + boundary(z, d, radius) * d, True
        z = z + alpha * d
        before = r
        r = r + alpha * h @ d
        if float(r.norm()) <= tol:
            break
        d = -r + float(r @ r) / float(before @ before) * d
    return z, False


def trust_region(f, theta, *, steps, cg_steps, radius, forcing=None, tol=1e-6):
    """Algorithm 4.1: the iterates, the radii, and which of the steps were taken."""
    path = [theta]
    radii = [radius]
    taken = []
    for _ in range(steps):
        g = torch.func.grad(f)(theta)
        if float(g.norm()) <= tol:
            break
        h = torch.func.hessian(f)(theta)
        eta = min(0.5, float(g.norm()) ** 0.5) if forcing is None else forcing
        s, at_boundary = steihaug(g, h, radius, eta * float(g.norm()), cg_steps)
        ratio = float((f(theta) - f(theta + s)) / -(g @ s + 0.5 * s @ h @ s))
        if ratio > 1e-4:
            theta = theta + s
        if ratio < 0.25:
            radius = float(s.norm()) / 4
        elif ratio > 0.75 and at_boundary:
            radius = 2 * radius
        path.append(theta)
        radii.append(radius)
        taken.append(ratio > 1e-4)
    return path, radii, taken
