"""Operations of torch whose derivatives are missing or wrong, mended while a block runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn, mha

from metaimplicit.graph import tangent_of
from metaimplicit.scoped import ScopedSettings
from metaimplicit.unsupported import SCALED_GRADIENT, UnsupportedOperationError

_ORIGINAL_EMBEDDING: Callable[..., Tensor] = torch.embedding
_ORIGINAL_RENORM: Callable[..., Tensor] = torch.embedding_renorm_
_ORIGINAL_MSE_LOSS: Callable[..., Tensor] = torch._C._nn.mse_loss
_ORIGINAL_BATCH_NORM: Callable[..., Tensor] = torch.batch_norm
_ORIGINAL_FLATTEN: Callable[[nn.RNNBase], None] = nn.RNNBase.flatten_parameters


class MendedDerivatives(ScopedSettings):
    """A block in which these operations have all their derivatives, as `with mended_derivatives:`.

    - Attention runs by its math kernel. The fused kernels have no second derivative, no tangent,
      and no batching rule on the CPU. The fast paths are off, as in `without_fast_path`.
    - Under `torch.vmap`, `padding_idx` of an embedding holds for every task. The batching rule of
      torch applies it to the first task alone. In forward mode, the padding row has no tangent. And
      `scale_grad_by_freq` counts the words of each task by itself. A second derivative of what it
      scales is refused: torch leaves the scales out of it. So is `max_norm` under a transform.
    - `F.mse_loss` has the tangent of its gradient outside of `torch.vmap`, too.
    - `nn.utils.weight_norm` has its second derivative. That of torch 2.14 is wrong on the CPU.
    - On CUDA, recurrent networks run without cuDNN, whose kernels have first derivatives only.
      Batch normalisation by running statistics works under transforms, too.

    These are settings of the whole process. They are as they were when the last thread leaves the
    block. What was computed within the block can be differentiated outside of it.

    Example:
        >>> weight, words = torch.ones(2, 3, 1), torch.zeros(2, 1, dtype=torch.int64)
        >>> def total(weight, words):  # of one task
        ...     return torch.nn.functional.embedding(words, weight, padding_idx=0).sum()
        >>> with mended_derivatives:
        ...     gradient = torch.vmap(torch.func.grad(total))(weight, words)
        >>> gradient.abs().sum()  # word 0 is the padding
        tensor(0.)
    """

    def __init__(self) -> None:
        super().__init__(_MENDED)

    def __enter__(self) -> None:
        without_fast_path.__enter__()
        super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        without_fast_path.__exit__()


class _Settings(NamedTuple):
    """What of torch the block changes."""

    flash: bool
    memory_efficient: bool
    cudnn: bool
    math: bool
    functions: tuple[Callable[..., Any], ...]  # in the places of `_PLACES`

    @classmethod
    def read(cls) -> _Settings:
        return cls(
            flash=cuda.flash_sdp_enabled(),
            memory_efficient=cuda.mem_efficient_sdp_enabled(),
            cudnn=cuda.cudnn_sdp_enabled(),
            math=cuda.math_sdp_enabled(),
            functions=tuple(getattr(owner, name) for owner, name in _PLACES),
        )

    def apply(self) -> None:
        # These flags hold on the CPU as well.
        cuda.enable_flash_sdp(self.flash)
        cuda.enable_mem_efficient_sdp(self.memory_efficient)
        cuda.enable_cudnn_sdp(self.cudnn)
        cuda.enable_math_sdp(self.math)
        # A TorchFunctionMode would see these calls as well, but it costs 3 % of a meta-step.
        for (owner, name), function in zip(_PLACES, self.functions, strict=True):
            setattr(owner, name, function)


def _embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """What `F.embedding` and `nn.Embedding` call in the place of `torch.embedding`."""
    ignored = getattr(_thread, "ignored", None)
    if ignored is not None and padding_idx >= 0:
        ignored.append(padding_idx)
        padding_idx = -1
    transforming = is_transforming()
    if transforming and scale_grad_by_freq:
        # A weight that the tasks share becomes one for each, so that words are counted per task.
        weight = weight + torch.zeros_like(indices, dtype=weight.dtype).sum()
    # Neither the batching rule of torch nor its tangent knows the padding of every task.
    masks = padding_idx >= 0 and (transforming or tangent_of(weight) is not None)
    own_padding = -1 if masks else padding_idx
    rows = _ORIGINAL_EMBEDDING(weight, indices, own_padding, scale_grad_by_freq, sparse)
    if scale_grad_by_freq:
        rows = _DifferentiableOnce.apply(rows)
    if not masks:
        return rows
    is_padding = (indices == padding_idx).unsqueeze(-1)
    return torch.where(is_padding, rows.detach(), rows)


def _embedding_renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """What embeddings with `max_norm` call. Under vmap, torch writes to what the tasks share."""
    if is_transforming():
        raise UnsupportedOperationError(
            "max_norm: a transform of torch.func cannot write to the weights of an embedding; "
            "leave it out"
        )
    return _ORIGINAL_RENORM(weight, indices, max_norm, norm_type)


class _Identity(torch.autograd.Function):
    """A function that returns its argument, in every transform of `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _DifferentiableOnce(_Identity):
    """The identity. Its gradient passes, but cannot be differentiated again."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _ScaledGradient.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


class _ScaledGradient(_Identity):
    """The identity, without a derivative."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise UnsupportedOperationError(SCALED_GRADIENT)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        raise UnsupportedOperationError(SCALED_GRADIENT)


def _mse_loss(inputs: Tensor, targets: Tensor, reduction: int = 1) -> Tensor:
    """What `F.mse_loss` and `nn.MSELoss` call. The reductions are 0 none, 1 mean and 2 sum."""
    # Under vmap torch's own function is decomposed, and has all derivatives.
    if not is_transforming() or torch._C._functorch.is_batchedtensor(inputs):
        return _ORIGINAL_MSE_LOSS(inputs, targets, reduction)
    squares = (inputs - targets).square()
    if reduction == 0:
        return squares
    return squares.mean() if reduction == 1 else squares.sum()


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The weight g v/‖v‖, with the norm over all axes but `dim`, or over all if it is −1."""
    kept = dim if dim == -1 else dim % v.dim()
    axes = tuple(axis for axis in range(v.dim()) if axis != kept)
    norm: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=dim != -1)
    return v * (g / norm)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """`torch.batch_norm`, which all of torch's batch normalisations call."""
    statistics = (mean, variance, training, momentum, eps, cudnn_enabled)
    if training or mean is None or variance is None or not (x.is_cuda and is_transforming()):
        return _ORIGINAL_BATCH_NORM(x, weight, bias, *statistics)
    return normalize(x, mean, variance, weight=weight, bias=bias, eps=eps)


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Y = γ (x − μ)/√(σ² + ε) + β for given statistics, by plain operations.

    Args:
        x: `[m, channels, …]`.
        mean: μ, `[channels]`.
        variance: σ², `[channels]`.
        weight: γ, `[channels]`. If None, 1.
        bias: β, `[channels]`. If None, 0.
        eps: ε.

    Example:
        >>> one = torch.ones(1)
        >>> normalize(torch.tensor([[3.0]]), one, 4 * one, weight=one, bias=None, eps=0.0)
        tensor([[1.]])
    """

    def spread(of_channels: Tensor) -> Tensor:
        return of_channels.reshape(-1, *[1] * (x.dim() - 2))

    y = (x - spread(mean)) * spread((variance + eps).rsqrt())
    y = y if weight is None else y * spread(weight)
    return y if bias is None else y + spread(bias)


def _flatten_parameters(module: nn.RNNBase) -> None:
    """It reads the memory of parameters, for cuDNN alone. Transformed parameters have none."""
    if not is_transforming():
        _ORIGINAL_FLATTEN(module)


def _without_cudnn(original: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent network that does not use cuDNN."""

    def call(*args: Any) -> Any:
        if not args[0].is_cuda or not cudnn.enabled:
            return original(*args)
        cudnn.enabled = False
        try:
            return original(*args)
        finally:
            cudnn.enabled = True

    return call


def is_transforming() -> bool:
    """Whether a transform of `torch.func`, such as vmap or jvp, is running.

    Example:
        >>> is_transforming(), torch.vmap(lambda x: x + is_transforming())(torch.zeros(2))
        (False, tensor([1., 1.]))
    """
    return torch._C._functorch.maybe_current_level() is not None


# The functions, by where their callers look them up.
_RECURRENT: list[tuple[Any, str]] = [
    (torch._VF, "lstm"),
    (torch._VF, "gru"),
    (torch._VF, "rnn_tanh"),
    (torch._VF, "rnn_relu"),
]
_PLACES: list[tuple[Any, str]] = [
    (torch, "embedding"),
    (torch, "embedding_renorm_"),
    (torch, "batch_norm"),
    (torch, "_weight_norm"),
    # `torch.nn.utils.weight_norm` is the function, which hides its module of the same name.
    (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm"),
    (torch._C._nn, "mse_loss"),
    (nn.RNNBase, "flatten_parameters"),
    *_RECURRENT,
]
_MENDED = _Settings(
    flash=False,
    memory_efficient=False,
    cudnn=False,
    math=True,
    functions=(
        _embedding,
        _embedding_renorm,
        _batch_norm,
        _weight_norm,
        _weight_norm,
        _mse_loss,
        _flatten_parameters,
        *(_without_cudnn(getattr(owner, name)) for owner, name in _RECURRENT),
    ),
)

mended_derivatives = MendedDerivatives()


class _FastPath(NamedTuple):
    """Whether modules of attention may take their fast path in `eval()`."""

    enabled: bool

    @classmethod
    def read(cls) -> _FastPath:
        return cls(mha.get_fastpath_enabled())

    def apply(self) -> None:
        mha.set_fastpath_enabled(self.enabled)


# A block in which `nn.MultiheadAttention` and `nn.TransformerEncoder` compute in `eval()` what they
# compute while gradients are recorded. Their fast paths have no derivative, and set the outputs at
# padded positions to zero. This is a setting of the whole process, as those above.
without_fast_path = ScopedSettings(_FastPath(False))

_thread = local()


@contextmanager
def without_padding() -> Iterator[list[int]]:
    """Give the padding rows of embeddings their gradient. The block receives their numbers.

    Example:
        >>> weight = torch.ones(3, 1, requires_grad=True)
        >>> with without_padding() as rows:
        ...     word = torch.nn.functional.embedding(torch.tensor(2), weight, padding_idx=2)
        >>> torch.autograd.grad(word.sum(), weight)[0].flatten(), rows
        (tensor([0., 0., 1.]), [2])
    """
    outside = getattr(_thread, "ignored", None)
    _thread.ignored = []
    try:
        with mended_derivatives:
            yield _thread.ignored
    finally:
        _thread.ignored = outside
