"""Second-order optimisers of one model, for the ordinary loop: `loss = optimizer.step(closure)`."""

from metaimplicit.optim.kfac import KFAC
from metaimplicit.optim.natural import GaussNewton, NaturalGradient
from metaimplicit.optim.newton import Newton

__all__ = ["KFAC", "GaussNewton", "NaturalGradient", "Newton"]
