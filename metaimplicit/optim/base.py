"""The base class of the second-order optimisers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaimplicit.operators.output_loss import Checked
from metaimplicit.optim.checks import (
    check_dependence,
    check_finite,
    check_pair,
    check_scalar,
)
from metaimplicit.optim.closure import Closure, ReplayedClosure
from metaimplicit.optim.damping import MeasuredLoss
from metaimplicit.params import Params
from metaimplicit.wrappers import reject_distributed

Loss = Callable[[Tensor, Any], Tensor]


class SecondOrder(torch.optim.Optimizer):
    """An optimiser of the parameters of one model that require grad, in one parameter group.

    Args:
        model: The model. All parameters that require grad have one type and one device.
        defaults: The options of the parameter group.
        seed: The seed of the random numbers. If None, the optimiser draws none.

    Attributes:
        ratio: ρ of the last step that computed it, the actual reduction of the loss over the
            predicted one. It is None before.
        closure_signature: What `step` expects, for messages.
        min_output_dims: The least number of axes of the model's outputs.

    Raises:
        ValueError: The model is no `nn.Module`, has no parameter that requires grad, or has
            parameters of several types, of several devices or in half precision.
    """

    closure_signature: ClassVar[str] = (
        "closure() -> (outputs, targets), as in step(lambda: (model(x), y))"
    )
    min_output_dims: ClassVar[int] = 0

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        seed: int | None = None,
    ) -> None:
        self._owner = type(self).__name__
        self._model = model
        self._trainable = _trainable_parameters(self._owner, model)
        self._dtype, self._device = _common_kind(self._owner, self._trainable)
        self._random: torch.Generator | None = None
        if seed is not None:
            self._random = torch.Generator().manual_seed(seed)
        self.ratio: float | None = None
        self._checked: Checked = {}  # what earlier steps have found out about the loss
        super().__init__(list(self._trainable.values()), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError: the parameters of one model are one group."""
        if self.param_groups:
            raise ValueError(
                f"{self._owner}: got another parameter group, expected one; use one model"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # The state of a copy or a pickle. torch's own would leave out the attributes of this class.
        # Left out are hooks, and the `step` that a scheduler wraps around this very object.
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not name.startswith("_optimizer_")
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to be resumed to the same bits.

        `torch.load(weights_only=True)` reads it.
        """
        state = super().state_dict()
        if self._random is not None:
            state["random"] = self._random.get_state()
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the result of `state_dict`.

        Raises:
            ValueError: The state has no random numbers, and this optimiser draws some.
        """
        if self._random is not None:
            if "random" not in state_dict:
                raise ValueError(
                    f"{self._owner} state_dict: got no entry 'random', expected the state of the "
                    "random numbers; load the state_dict of an optimiser of this class"
                )
            self._random.set_state(state_dict["random"].cpu())
        known_to_torch = {key: x for key, x in state_dict.items() if key != "random"}
        super().load_state_dict(known_to_torch)

    def _make_generator(self) -> torch.Generator:
        """A generator on the parameters' device. Only the CPU generator that seeds it is state."""
        seed = int(torch.randint(2**62, (), generator=self._random, device="cpu"))
        return torch.Generator(self._device).manual_seed(seed)

    def _check_closure(self, closure: Closure | None) -> Closure:
        if not callable(closure):
            got = None if closure is None else type(closure).__name__
            raise ValueError(f"step: got {got}, expected {self.closure_signature}")
        present = dict(self._model.named_parameters())
        for name, p in self._trainable.items():
            if present.get(name) is not p:
                raise ValueError(
                    f"step: {name!r} was replaced after the optimiser was built; "
                    "build another optimiser"
                )
            if not p.requires_grad:
                raise ValueError(
                    f"step: {name!r} was frozen after the optimiser was built; "
                    "build another optimiser"
                )
        unmoved = [n for n, p in present.items() if p.requires_grad and n not in self._trainable]
        if unmoved:
            # Between here and the caller of `step` are its decorators.
            warnings.warn(
                f"step: {', '.join(map(repr, unmoved))} were added or unfrozen after the optimiser "
                "was built, and do not move; build another optimiser, unless another one moves "
                "them",
                RuntimeWarning,
                stacklevel=7,
            )
        self._follow_model()
        return closure

    def _follow_model(self) -> None:
        """Take the type and the device that the model has now, as after `model.double()`."""
        kind = _common_kind(self._owner, self._trainable)
        if kind == (self._dtype, self._device):
            return
        self._dtype, self._device = kind
        self._checked.clear()
        for slots in self.state.values():
            for name, value in slots.items():
                slots[name] = value.to(self._device, self._dtype)

    def _unpack(self, result: Any) -> tuple[Tensor, Any]:
        """The outputs and targets that the closure returned."""
        signature = self.closure_signature
        return check_pair(result, signature, min_dims=self.min_output_dims)

    def _task_params(self) -> Params:
        """The parameters as operators expect them, `{name: [1, *shape]}`."""
        return {name: p.unsqueeze(0) for name, p in self._trainable.items()}


class BatchLoss:
    """L(θ) = ℓ(z(θ)) of one batch, in the two parts from which operators are built.

    The parts have the axis of one task. `outputs` is called before `loss`, whose first call checks
    that the loss is finite and depends on the model.

    Args:
        optimizer: The optimiser whose model is evaluated.
        evaluate: The closure of the batch.
        loss: `(outputs, targets) -> scalar`.

    Attributes:
        value: L at the outputs for which `loss` was called first, a detached scalar.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> def closure():
        ...     return model(torch.ones(3, 1)), torch.tensor(2.0)
        >>> replay = ReplayedClosure(model, closure, torch.device("cpu"))
        >>> batch = BatchLoss(SecondOrder(model, {}), replay, lambda z, y: (z - y).square().mean())
        >>> z = batch.outputs({"weight": torch.zeros(1, 1, 1, requires_grad=True)})
        >>> z.shape, batch.loss(z).item()
        (torch.Size([1, 3, 1]), 4.0)
    """

    value: Tensor
    _first_outputs: Tensor

    def __init__(
        self,
        optimizer: SecondOrder,
        evaluate: ReplayedClosure,
        loss: Loss,
    ) -> None:
        self._optimizer = optimizer
        self._evaluate = evaluate
        self._loss = loss
        self._targets: Any = None
        self._is_checked = False

    def outputs(self, params: Params) -> Tensor:
        """z(θ), `{name: [1, *shape]} -> [1, …]`. The targets come from the same call."""
        single = {name: p.squeeze(0) for name, p in params.items()}
        result = self._evaluate(single)
        outputs, self._targets = self._optimizer._unpack(result)
        check_dependence(outputs, self._optimizer._trainable, source="closure")
        return outputs.unsqueeze(0)

    def loss(self, outputs: Tensor) -> Tensor:
        """ℓ(z), `[1, …] -> [1]`."""
        value = check_scalar(self._loss(outputs.squeeze(0), self._targets), "loss")
        if not self._is_checked:
            self._is_checked = True
            self._check(value, outputs)
            self.value = value.detach()
            self._first_outputs = outputs.detach().squeeze(0)
        return value.unsqueeze(0)

    def measure(self) -> MeasuredLoss:
        """`value` with the digits that a comparison needs."""
        return MeasuredLoss.of_outputs(
            self._loss, self._first_outputs, self._targets, value=self.value
        )

    def _check(self, value: Tensor, outputs: Tensor) -> None:
        owner = type(self._optimizer).__name__
        check_finite(owner, value, outputs)
        check_dependence(value, self._optimizer._trainable, source="loss")


def _trainable_parameters(owner: str, model: nn.Module) -> Params:
    """The parameters that require grad, by name, if the optimisers can work with them."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{owner} model: got {type(model).__name__}, expected an nn.Module, "
            "whose parameters have names"
        )
    reject_distributed(model)
    named = model.named_parameters()
    trainable: Params = {name: p for name, p in named if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"{owner} model: got no parameter that requires grad, expected at least one"
        )
    return trainable


def _common_kind(owner: str, trainable: Params) -> tuple[torch.dtype, torch.device]:
    """The one type and the one device of the parameters, if the optimisers can work with them."""
    first = next(iter(trainable.values()))
    for name, p in trainable.items():
        got = f"{owner} model: got {name!r} as {p.dtype} on {p.device}"
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{got}, expected single or double precision; convert the model first")
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"{got}, expected {first.dtype} on {first.device} of every parameter; convert the "
                "model first"
            )
    return first.dtype, first.device
