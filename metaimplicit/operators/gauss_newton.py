"""The generalised Gauss–Newton matrix of a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaimplicit.graph import (
    check_differentiable,
    check_twice_differentiable,
    find_dependencies,
)
from metaimplicit.operators.curvature import (
    LossParts,
    RetainedGraphCurvature,
    flat_vjp,
    mended,
    vjp,
)
from metaimplicit.operators.cut import Cut, cut_before_log_softmax
from metaimplicit.operators.output_loss import (
    Checked,
    OutputLoss,
    output_gradient,
    widen,
)
from metaimplicit.params import Params, unflatten


class GGN(RetainedGraphCurvature):
    """Jᵀ (∂²ℓ/∂z²) J with z = outputs(θ) and J = ∂z/∂θ (Schraudolph 2002, §2).

    It is the Hessian without the curvature of the network itself, and positive semi-definite if ℓ
    is convex in z. Jv is the derivative of r ↦ Jᵀr, so every product runs through retained graphs
    and no forward pass is repeated.

    If the loss is linear in z and z are log-probabilities (log-softmax and `nll_loss`), z are the
    logits instead, see `cut_before_log_softmax`. For any other loss that is linear in z the matrix
    is zero. If the Hessian is not, a warning says so.

    Where z are log-probabilities and the loss is not linear, z are the logits as well if that adds
    a positive semi-definite matrix. If it does not, or z are probabilities, the matrix lacks the
    curvature of the model's last function, and a warning says so.

    Args:
        outputs: z, `{name: [tasks, *shape]} -> [tasks, …]`, task by task.
        loss: ℓ, `[tasks, …] -> [tasks]`, convex in the outputs (cross-entropy, squared error, …).
            Its Hessian in the outputs is taken by autograd.
        params: The point θ, `{name: [tasks, *shape]}`.
        checked: What earlier checks of this loss have found. If None, they are made again.

    Attributes:
        has_other_loss: Whether the outputs are those before the model's last function.

    Raises:
        ValueError: The outputs use an operation without a second derivative. Or the loss depends on
            θ beside the outputs.

    Example:
        >>> params = {"w": torch.tensor([[1.0, 2.0]])}
        >>> ggn = GGN(lambda p: p["w"].square(), lambda z: z.square().sum(1), params)
        >>> ggn.matvec(torch.ones(1, 2))  # J = diag(2w), ∂²ℓ/∂z² = 2I
        tensor([[ 8., 32.]])
    """

    semidefinite = True
    looks_into_layers = False

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __init__(
        self,
        outputs: Callable[[Params], Tensor],
        loss: OutputLoss,
        params: Params,
        *,
        checked: Checked | None = None,
    ) -> None:
        super().__init__(params)
        self._outputs = mended(outputs)(self.params)
        total = loss(self._outputs)
        _check_reads_outputs_alone(total, self._outputs, self.params)
        cut = cut_before_log_softmax(
            loss, self._outputs.detach(), {} if checked is None else checked
        )
        self._loss = self._choose(cut)
        self.has_other_loss = self._loss is not loss
        if self._loss is not loss:
            total = self._loss(self._outputs)
        # r = ∂ℓ/∂z
        (self._slope,) = torch.autograd.grad(total.sum(), self._outputs, create_graph=True)
        if not self._slope.requires_grad:
            # The loss is linear in z. Jᵀr still needs a tensor r to be differentiated at.
            self._slope = self._slope.requires_grad_()

        gradients = torch.autograd.grad(
            self._outputs,
            list(self.params.values()),
            self._slope,
            create_graph=True,
            allow_unused=True,
        )
        self._set_gradient(gradients)
        check_differentiable(gradients)
        check_twice_differentiable([total], [self._outputs])
        if cut.is_linear:
            self._warn_of_zero()

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> GGN:
        """The Gauss–Newton matrix of a loss; it has no options."""
        return cls(
            parts.outputs,
            parts.loss,
            parts.params,
            checked=parts.checked,
            **options,
        )

    def matvec(self, vector: Tensor) -> Tensor:
        """Jᵀ (∂²ℓ/∂z²) J v, `[tasks, n] -> [tasks, n]`."""
        return self._product(unflatten(vector, self.params), batched=False)

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products with k vectors at once, `[k, tasks, n] -> [k, tasks, n]`."""
        return self._product(unflatten(vectors, self.params), batched=True)

    def check_convex(self, steps: int = 20) -> None:
        """Raise ValueError if the loss has negative curvature in the outputs.

        Power iterations look for it, in float64 where the loss can be evaluated in float64.

        Args:
            steps: The number of power iterations for each end of the spectrum.
        """
        z, slope = output_gradient(self._loss, widen(self._loss, self._outputs))
        if not slope.requires_grad:  # a linear loss
            return

        def product(v: Tensor) -> Tensor:
            """(∂²ℓ/∂z²) v, `[tasks, size] -> [tasks, size]`."""
            (hv,) = torch.autograd.grad(
                slope,
                z,
                v.reshape(z.shape),
                retain_graph=True,
            )
            return hv.reshape(len(z), -1)

        generator = torch.Generator().manual_seed(0)
        shape = (2, *z.shape[1:])
        draws = torch.randn(
            shape,
            generator=generator,
            dtype=z.dtype,
            device="cpu",
        ).to(z.device)
        first, second = (draw.expand(z.shape).reshape(len(z), -1) for draw in draws)
        # The largest |λ| comes first. Then |λ|_max I − ∂²ℓ/∂z² has its largest eigenvalue at the
        # smallest λ.
        zero = z.new_zeros(len(z), 1)
        _, largest = _power_iteration(product, first, shift=zero, steps=steps)
        smallest, _ = _power_iteration(
            product,
            second,
            shift=largest,
            steps=steps,
        )
        roundoff = 1e-3 * largest.squeeze(1) + 1e-13
        if bool((smallest < -roundoff).any()):
            raise ValueError(
                "Gauss–Newton: got a loss that is not convex in the outputs (curvature "
                f"{float(smallest.min()):.2g}), expected one that is; use curvature='hessian'"
            )

    def _choose(self, cut: Cut) -> OutputLoss:
        """The loss behind the cut, before the model's last function if that adds to the matrix."""
        if cut.left_out is None:
            return cut.loss
        if cut.left_out.is_semidefinite:
            return cut.left_out.loss
        cut.left_out.warn("Gauss–Newton")
        return cut.loss

    def _warn_of_zero(self) -> None:
        """Warn if the loss is linear in z and the model is not linear in θ."""
        # Then the Hessian is ∂(Jᵀr)/∂θ with a constant r, and Gauss–Newton leaves out all of it.
        direction = {name: torch.ones_like(g) for name, g in self.gradient.items()}
        if bool((flat_vjp(self.gradient, self.params, direction).abs() > 0).any()):
            warnings.warn(
                "Gauss–Newton: the loss is linear in the outputs, so its Gauss–Newton matrix is "
                "zero, although its Hessian is not; use curvature='hessian' (optim.Newton), or cut "
                "the model before its last function and let the loss apply that",
                RuntimeWarning,
                stacklevel=2,
            )

    def _product(self, vector: Params, batched: bool) -> Tensor:
        # Jv: the gradient is Jᵀr at r = ∂ℓ/∂z, so its derivative in r, pulled back from v, is Jv.
        gradient = {name: self.gradient[name] for name in vector}
        tangent = vjp(gradient, {"r": self._slope}, vector, batched=batched)["r"]
        cotangent = self._output_hessian_product(tangent, batched)
        outputs = {"outputs": self._outputs}
        return flat_vjp(
            outputs,
            self.params,
            {"outputs": cotangent},
            batched=batched,
        )

    def _output_hessian_product(
        self,
        tangent: Tensor,
        batched: bool,
    ) -> Tensor:
        """(∂²ℓ/∂z²) ż, in the shape of the outputs (with k vectors first, if `batched`)."""
        z = {"z": self._outputs}
        return vjp({"r": self._slope}, z, {"r": tangent}, batched=batched)["z"]


def _power_iteration(
    product: Callable[[Tensor], Tensor], v: Tensor, *, shift: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Power iterations on sI − H: vᵀHv `[tasks]` and ‖(sI − H)v‖ `[tasks, 1]` of the last v."""
    for _ in range(steps):
        v = v / v.norm(dim=1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        hv = product(v)
        quotient = (v.conj() * hv).real.sum(1)
        v = shift * v - hv
    return quotient, v.norm(dim=1, keepdim=True)


def _check_reads_outputs_alone(total: Tensor, outputs: Tensor, params: Params) -> None:
    """Raise ValueError if a loss depends on a parameter by another way than the outputs.

    Such a way is an auxiliary loss that the model leaves in an attribute.
    """
    others = {name: p for name, p in params.items() if p is not outputs}
    for name in find_dependencies([total], others, params=[outputs]):
        raise ValueError(
            f"loss: it depends on {name!r} beside the outputs of the model, so that Gauss–Newton "
            "and Fisher would leave out a part of it; use curvature='hessian', or let the model "
            "return what the loss needs"
        )
