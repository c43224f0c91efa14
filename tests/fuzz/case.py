"""A case of the fuzzer: one small problem and one way to differentiate it, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

SLOPED = ("GradientDescent", "SGD", "Adam", "AdamW")  # the oracle has differentiable steps of these
ADAPTIVE = ("Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax")
SOLVED = ("LBFGS", "NewtonCG")  # loops without an optimiser's steps
SEQUENCES = ("attention", "encoder", "dot-product", "lstm", "gru")
KRONECKER = ("kfac", "ekfac")


@dataclass(frozen=True)
class Case:
    """What is differentiated, and how. The defaults are the plainest case: MAML on a small MLP.

    Attributes:
        seed, index: where the case comes from; they also seed its data and initial parameters.
        door: `"learner"`, `"hypergradient"` or `"argmin"`, the public function that is called.
        form: of the inner loss, `"composite"` or `"function"`.
        batched: whether the data carry a task axis.
        tasks, examples, outputs: sizes; `outputs` is the model's width at its end.
        model, activation, norm: of the network.
        log_softmax: whether the model ends in a log-softmax.
        padding: whether an embedding has `padding_idx=0`; token 0 occurs in the data in any case.
        dropout: whether dropout is active.
        frozen: whether the first parameter tensor requires no grad.
        adapt: `"all"`, or `"head"`: the other parameters are meta-learnt only.
        loss, variant, loss_form: of inner and outer loss; see `losses`.
        labels: the dtype of class labels.
        meta: the meta-parameters: `"start"`, `"decay"`, `"gain"`, `"lr"` or `"proximal"`.
        proximal: the strength λ of the penalty.
        inner, steps, lr, options: of the inner loop.
        method: `"unrolled"`, `"forward"`, `"truncated"`, `"first-order"` or `"implicit"`.
        solver, solver_steps, scale, rho: of an implicit method; `"truncated"` has steps, too.
        curvature, products, preconditioner, damping: of an implicit method.
        bare: whether the method is named by its flag, with the flag's own numbers.
        vectorize, chunk, dtype: how it is run.
    """

    seed: int = 0
    index: int = 0
    door: str = "learner"
    form: str = "composite"
    batched: bool = True
    tasks: int = 2
    examples: int = 6
    outputs: int = 3
    model: str = "mlp"
    activation: str = "tanh"
    norm: str = "none"
    log_softmax: bool = False
    padding: bool = False
    dropout: bool = False
    frozen: bool = False
    adapt: str = "all"
    loss: str = "cross-entropy"
    variant: str = "plain"
    loss_form: str = "function"
    labels: str = "int64"
    meta: str = "start"
    proximal: float = 0.0
    inner: str = "GradientDescent"
    steps: int = 2
    lr: float = 0.1
    options: tuple[tuple[str, Any], ...] = ()
    method: str = "unrolled"
    solver: str = "none"
    solver_steps: int = 0
    scale: float = 0.0
    rho: float = 0.0
    curvature: str = "default"
    products: str = "double-backward"
    preconditioner: str = "none"
    damping: float = 0.0
    bare: bool = False
    vectorize: str = "loop"
    chunk: int = 0
    dtype: str = "float64"

    @property
    def implicit(self) -> bool:
        return self.method == "implicit"

    @property
    def classes(self) -> bool:
        """Whether the targets are class labels."""
        return self.loss in ("cross-entropy", "nll")

    @property
    def matrix(self) -> str:
        """The curvature that A is made of, with the front door's default filled in."""
        if self.curvature != "default":
            return self.curvature
        return "gauss-newton" if self.door == "learner" else "hessian"

    @property
    def coupled_decay(self) -> float:
        """δ of the term δ/2 ‖θ‖² that the inner optimiser adds to the loss it descends on.

        Averaged SGD's step θ(1 − λη) − ηg is that of plain SGD with the decay λ = `lambd`.
        """
        options = dict(self.options)
        decay = 0.0 if self.inner == "AdamW" else options.get("weight_decay", 0.0)
        return decay + (options.get("lambd", 1e-4) if self.inner == "ASGD" else 0.0)

    @property
    def decoupled_decay(self) -> float:
        """AdamW's weight decay, whose default in torch is 0.01."""
        return dict(self.options).get("weight_decay", 0.01) if self.inner == "AdamW" else 0.0

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name in ("seed", "index") or getattr(self, field.name) != field.default
        ]
        return " ".join(changed)
