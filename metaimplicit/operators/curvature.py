"""What a curvature is: an operator made of the derivatives of a loss at a point."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metaimplicit.mended import mended_derivatives
from metaimplicit.operators.base import Invertible, LinearOperator
from metaimplicit.operators.output_loss import Checked, OutputLoss
from metaimplicit.params import Params, flatten, joint_dtype, leaves
from metaimplicit.recomputation import mended_recomputation
from metaimplicit.tensors import recordable

# What torch says of operations that allow no batch, such as `argmin`, products with sparse
# matrices, and dropout in a block that is computed again in the backward pass.
NO_BATCH = (
    "Batching rule not implemented",
    "expand is unsupported for Sparse",
    "random operations inside of vmap",
)

Operator = TypeVar("Operator", bound="Curvature")
Result = TypeVar("Result")


@dataclass(frozen=True)
class LossParts:
    """A loss at a point, in the parts that a curvature is built from, over the task axis.

    Args:
        params: The point θ, `{name: [tasks, *shape]}`.
        outputs: z(θ), `{name: [tasks, *shape]} -> [tasks, …]`. For a loss without parts, the loss.
        loss: ℓ(z), `[tasks, …] -> [tasks]`. For a loss without parts, the identity.
        module: The model whose layers are seen, if there is one.
        apply_model: Lifts a function of one task's model over the task axis: `(function, params)`,
            where `function(call, params)` receives the model as `call(params) -> outputs`.
        checked: What earlier checks of the loss have found. Whoever evaluates one loss again and
            again hands in one dict.
        whole: ℓ(z(θ)), `{name: [tasks, *shape]} -> [tasks]`, for a curvature that does not read the
            outputs. They may then be more than one tensor, and the loss may read more of a model
            than them. If None, it is made of the parts.

    Example:
        >>> parts = LossParts(
        ...     params={"w": torch.tensor([[1.0, 2.0]])},
        ...     outputs=lambda params: 3 * params["w"],
        ...     loss=lambda z: z.square().sum(1),
        ... )
        >>> parts.total(parts.params)
        tensor([45.])
    """

    params: Params
    outputs: Callable[[Params], Tensor]
    loss: OutputLoss
    module: nn.Module | None = None
    apply_model: Callable[[Callable[..., Any], Params], Any] | None = None
    checked: Checked = field(default_factory=dict)
    whole: Callable[[Params], Tensor] | None = None

    def total(self, params: Params) -> Tensor:
        """ℓ(z(θ)), `{name: [tasks, *shape]} -> [tasks]`."""
        return self.loss(self.outputs(params)) if self.whole is None else self.whole(params)


class Curvature(LinearOperator):
    """A linear operator made of the derivatives of a loss at a point.

    A new curvature implements `from_loss` and `matvec`, and has a row in `CURVATURES`.

    Attributes:
        params: The point θ, `{name: [tasks, *shape]}`.
        gradient: ∂ℓ/∂θ in the same layout, with the graph through which further derivatives go.
        needs_outputs: Whether it needs a loss whose outputs are visible (a `Composite`).
        looks_into_layers: Whether it may need the layers of the model that the loss calls. If it
            does not, those that do not adapt are evaluated once.

    Example:
        >>> from metaimplicit.operators import Hessian
        >>> parts = LossParts(
        ...     params={"w": torch.tensor([[1.0, 2.0]])},
        ...     outputs=lambda params: params["w"],
        ...     loss=lambda z: z.square().sum(1),
        ... )
        >>> Hessian.from_loss(parts).matvec(torch.ones(1, 2))
        tensor([[2., 2.]])
    """

    needs_outputs: bool = True
    looks_into_layers: bool = True

    params: Params
    gradient: Params

    @classmethod
    @abstractmethod
    def from_loss(cls: type[Operator], parts: LossParts, **options: Any) -> Operator:
        """The curvature of a loss.

        Args:
            parts: The loss and the point.
            options: Further arguments of the class's constructor.

        Raises:
            ValueError: The loss lacks a part that this curvature needs.
        """

    @classmethod
    def preconditioner(cls, core: LinearOperator, parts: LossParts, **options: Any) -> Invertible:
        """An invertible approximation of `core`, to precondition conjugate gradients.

        Args:
            core: The operator to approximate. By default it is not looked at: the approximation
                is the curvature of `parts`.
            parts: The loss and the point.
            options: Further arguments of the class's constructor.

        Raises:
            ValueError: The class does not know its inverse.
        """
        operator = cls.from_loss(parts, **options)
        if not isinstance(operator, Invertible):
            raise ValueError(
                f"preconditioner: got {cls.__name__}, expected a curvature that knows its inverse"
            )
        return operator


class RetainedGraphCurvature(Curvature):
    """A curvature whose products run through graphs that are kept from its construction.

    A column differentiates the gradient with respect to one parameter tensor alone, and most of
    the graph has no part in that: `columns` is cheaper than as many products.

    Args:
        params: The point θ, `{name: [tasks, *shape]}`.

    Attributes:
        params: The point θ, as leaves of autograd.
        gradient: ∂ℓ/∂θ, `{name: [tasks, *shape]}`, with the graph to further derivatives.

    Raises:
        ValueError: θ is no point at which a loss has derivatives; see `check_point`.
    """

    def __init__(self, params: Params) -> None:
        check_point(params)
        self.params = leaves({name: recordable(p) for name, p in params.items()})
        first = next(iter(params.values()))
        self.shape = (len(first), sum(p[0].numel() for p in params.values()))
        self.dtype = joint_dtype(params.values())
        self.device = first.device
        self.gradient: Params = {}

    def columns(self, index: Tensor) -> Tensor:
        """Columns of A, `[k] -> [k, tasks, n]`, the tensors of `params` one after another.

        Raises:
            ValueError: There is no index, or one is not in 0 … n−1.
        """
        n = self.shape[1]
        if not len(index) or bool(((index < 0) | (index >= n)).any()):
            raise ValueError(f"index: got {index.tolist()}, expected numbers from 0 to {n - 1}")
        start = 0
        parts = []
        positions = []
        for name, p in self.params.items():
            size = p[0].numel()
            inside = (index >= start) & (index < start + size)
            position = inside.nonzero().squeeze(-1)
            if len(position):
                unit = p.new_zeros(len(position), size)
                rows = torch.arange(len(position), device=index.device)
                unit[rows, index[position] - start] = 1.0
                vectors = unit.reshape(-1, 1, *p.shape[1:]).expand(-1, *p.shape)
                parts.append(self._product({name: vectors}, batched=True))
                positions.append(position)
            start += size
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.cat(positions).argsort()]

    @abstractmethod
    def _product(self, vector: Params, batched: bool) -> Tensor:
        """The product with a vector, `[tasks, n]`.

        Entries that `vector` lacks are zero. If `batched`, its tensors lead with an axis of k
        vectors, and so does the result, `[k, tasks, n]`.
        """

    def _set_gradient(self, gradients: Sequence[Tensor | None]) -> None:
        pairs = zip(self.params.items(), gradients, strict=True)
        self.gradient = {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def check_point(params: Params) -> None:
    """Raise ValueError unless these are real numbers over one task axis.

    Example:
        >>> check_point({"w": torch.ones(2, 3), "b": torch.ones(1)})
        Traceback (most recent call last):
        ValueError: params: got 'b' of shape (1,), expected [2, …], as the first has 2 tasks
    """
    if not isinstance(params, Mapping) or not params:
        got = "an empty one" if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"params: got {got}, expected a dict of tensors by name, {{name: [tasks, *shape]}}"
        )
    tasks = None
    for name, p in params.items():
        if not p.is_floating_point():
            raise ValueError(
                f"params: got {name!r} in {p.dtype}, expected real floating-point numbers"
            )
        if p.dim() == 0 or len(p) == 0:
            raise ValueError(
                f"params: got {name!r} of shape {tuple(p.shape)}, expected [tasks, …] with a task"
            )
        tasks = tasks or len(p)
        if len(p) != tasks:
            raise ValueError(
                f"params: got {name!r} of shape {tuple(p.shape)}, expected [{tasks}, …], as the "
                f"first has {tasks} tasks"
            )


def mended(function: Callable[..., Result]) -> Callable[..., Result]:
    """The same function, which runs where the derivatives of torch are mended.

    A method runs its losses there in any case, but an operator may be made of any function.

    Example:
        >>> mended(lambda x: x + 1)(torch.ones(2))
        tensor([2., 2.])
    """

    def call(*args: Any) -> Result:
        if torch.compiler.is_compiling():
            return function(*args)
        with mended_recomputation, mended_derivatives:
            return function(*args)

    return call


def vjp(
    outputs: Params,
    inputs: Params,
    vectors: Params,
    *,
    batched: bool = False,
) -> Params:
    """(∂outputs/∂inputs)ᵀ vectors by input. It is zero for inputs that nothing connects.

    Args:
        outputs: Tensors with their graph, `{name: [tasks, …]}`. The graph is retained.
        inputs: Tensors in that graph, `{name: [tasks, *shape]}`.
        vectors: One for each output, of its shape.
        batched: Whether each vector leads with an axis of k vectors. So does the result then.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> vjp({"square": x.square()}, {"x": x}, {"square": torch.ones(1, 2)})
        {'x': tensor([[2., 4.]])}
    """
    connected = [name for name, output in outputs.items() if output.requires_grad]
    products: Sequence[Tensor | None] = [None] * len(inputs)
    if connected:
        pull_back = partial(
            torch.autograd.grad,
            [outputs[name] for name in connected],
            list(inputs.values()),
            retain_graph=True,
            allow_unused=True,
        )
        connected_vectors = [vectors[name] for name in connected]
        if batched:
            products = all_at_once(pull_back, connected_vectors)
        else:
            products = pull_back(connected_vectors)
    lead = next(iter(vectors.values())).shape[:1] if batched else ()
    pairs = zip(inputs.items(), products, strict=True)
    return {
        name: x.new_zeros(*lead, *x.shape) if product is None else product
        for (name, x), product in pairs
    }


def all_at_once(
    pull_back: Callable[..., Sequence[Tensor | None]], vectors: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Products with k vectors in one batch, or in a loop if an operation allows no batch.

    Args:
        pull_back: `torch.autograd.grad` as a function of its `grad_outputs`. It retains the graph.
        vectors: One for each output, `[k, …]`.

    Returns:
        One for each input, `[k, …]`, or None where nothing connects it.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> pull_back = partial(torch.autograd.grad, [x.square()], [x], retain_graph=True)
        >>> all_at_once(pull_back, [torch.eye(2)])[0]
        tensor([[2., 0.],
                [0., 4.]])
    """
    try:
        return pull_back(vectors, is_grads_batched=True)
    except RuntimeError as error:
        if not any(message in str(error) for message in NO_BATCH):
            raise
    rows = [pull_back(row) for row in zip(*vectors, strict=True)]
    columns = zip(*rows, strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


def flat_vjp(
    outputs: Params,
    inputs: Params,
    vectors: Params,
    *,
    batched: bool = False,
) -> Tensor:
    """The same as `vjp`, as one vector for each task, `[tasks, n]`, or `[k, tasks, n]`.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> flat_vjp({"square": x.square()}, {"x": x}, {"square": torch.ones(1, 2)})
        tensor([[2., 4.]])
    """
    products = vjp(outputs, inputs, vectors, batched=batched)
    return flatten(products, batch=2 if batched else 1)
