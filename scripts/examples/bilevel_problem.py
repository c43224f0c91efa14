"""Any bilevel problem: the decay of a ridge regression, tuned on a validation set.

python scripts/examples/bilevel_problem.py      # a few seconds
"""

import torch
from torch import Tensor

from metaimplicit import (
    BilevelProblem,
    Composite,
    FromMeta,
    NewtonCG,
    Proximal,
    check_hypergradient,
    hypergradient,
)

Params = dict[str, Tensor]


def predict(params: Params, meta: Params, data: dict[str, Tensor]) -> Tensor:
    """The linear model on the training inputs."""
    return data["x"] @ params["w"]


def validation_loss(params: Params, meta: Params, data: dict[str, Tensor]) -> Tensor:
    """The mean squared error on the validation set."""
    return (data["x_val"] @ params["w"] - data["y_val"]).square().mean()


def main(outer_steps: int = 30) -> float:
    """Tune the decay, check the hypergradient, and return the last validation loss."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    truth = torch.randn(20)
    x = torch.randn(30, 20)
    x_val = torch.randn(50, 20)
    data = {
        "x": x,
        "y": x @ truth + 3 * torch.randn(30),
        "x_val": x_val,
        "y_val": x_val @ truth + 3 * torch.randn(50),
    }

    # The inner loss in its parts: outputs, a loss of the outputs, and a penalty ½ e^φ ‖w‖².
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(20)},
        inner_loss=Composite(
            outputs=predict,
            loss=lambda z, data: (z - data["y"]).square().mean(),
            penalty=Proximal(FromMeta("log_decay", torch.exp), center="zero"),
        ),
        outer_loss=validation_loss,
    )
    meta = {"log_decay": torch.tensor(-4.0)}
    inner = NewtonCG(steps=50, cg_steps=25, tol=1e-10)  # the theorem needs a minimum

    print(check_hypergradient(problem, meta, data, inner=inner, method="dense"))
    for step in range(outer_steps):
        result = hypergradient(problem, meta, data, inner=inner, method="dense")
        meta["log_decay"] = meta["log_decay"] - 0.5 * result.grads["log_decay"]
        if (step + 1) % 10 == 0:
            decay = meta["log_decay"].exp().item()
            print(f"step {step + 1}: validation loss {result.outer_loss:.4f}, decay {decay:.3f}")
    torch.set_default_dtype(torch.float32)
    return float(result.outer_loss)


if __name__ == "__main__":
    main()
