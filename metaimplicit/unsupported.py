"""What torch cannot differentiate, vmap or mix: its errors, with what to do about them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

FIRST_DERIVATIVES = (
    "'first-order' or Implicit(products='finite-differences'), which need first derivatives only"
)
REVERSE_MODE = (
    "reverse mode: 'unrolled' in the place of 'forward', "
    "products='double-backward' in the place of 'forward-over-reverse'"
)
LOOP = "vectorize='loop'"
SCALED_GRADIENT = (
    "scale_grad_by_freq: an embedding that scales its gradient has that of no loss, so that it "
    "cannot be differentiated again; use scale_grad_by_freq=False"
)


class UnsupportedOperationError(ValueError, RuntimeError):
    """An operation that torch cannot differentiate or vmap as a method needs.

    The message names the operation and what to do. The `__cause__` is torch's own error.
    """


@contextmanager
def explain_unsupported(first_derivatives: str = FIRST_DERIVATIVES) -> Iterator[None]:
    """Raise torch's errors about what it cannot differentiate or vmap with what to do about them.

    Other errors pass unchanged.

    Args:
        first_derivatives: What to use for an operation without second derivatives.

    Raises:
        UnsupportedOperationError: In the place of an error of torch that `ADVICE` has a row for.

    Example:
        >>> import torch
        >>> from torch.autograd.functional import hessian
        >>> from torch.nn.functional import multi_margin_loss
        >>> with explain_unsupported():
        ...     hessian(lambda z: multi_margin_loss(z, torch.tensor(0)), torch.zeros(3))
        Traceback (most recent call last):
        ...
        metaimplicit.unsupported.UnsupportedOperationError: multi_margin_loss: torch has no second \
derivative of it; use 'first-order' or ...
    """
    try:
        yield
    except UnsupportedOperationError:
        raise
    except (RuntimeError, AssertionError) as error:
        # The assertions of others are not torch's.
        of_torch = isinstance(error, RuntimeError) or "flat_bdims" in _message(error)
        advice = find_advice(error, first_derivatives) if of_torch else None
        if advice is None:
            raise
        raise UnsupportedOperationError(advice) from error


def find_advice(error: Exception, first_derivatives: str = FIRST_DERIVATIVES) -> str | None:
    """What an error of torch means and what to do, by its message. None for any other error.

    Args:
        error: The error.
        first_derivatives: What to use for an operation without second derivatives.

    Example:
        >>> find_advice(RuntimeError("Batching rule not implemented for aten::lstm.input."))
        "lstm.input: torch cannot vmap it; use vectorize='loop'"
        >>> find_advice(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
        True
    """
    message = _message(error)
    for pattern, advice in ADVICE.items():
        match = re.search(pattern, message)
        if match is not None:
            name = match[1] if match.re.groups else shorten(error)
            replacement = "".join(text for part, text in REPLACEMENTS.items() if part in name)
            return advice.format(name, replacement, first_derivatives)
    return None


def _message(error: Exception) -> str:
    """What an error says. An assertion that says nothing is its line, as in older versions."""
    if str(error) or error.__traceback__ is None:
        return str(error)
    return traceback.extract_tb(error.__traceback__)[-1].line or ""


def shorten(error: BaseException) -> str:
    """The first line of an error's message, without requests to file an issue.

    Example:
        >>> shorten(RuntimeError("It is broken. Please file an issue."))
        'It is broken'
    """
    line, *_ = str(error).strip().splitlines() or [""]
    return re.split(r"[.,]?\s+(?=[Pp]lease )|\.\s+(?=We don't support)", line)[0].rstrip(".")


def find_module(error: BaseException) -> nn.Module | None:
    """The innermost module whose forward pass raised an error. None if there is none.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
        >>> try:
        ...     model(torch.ones(1, 2))
        ... except RuntimeError as error:
        ...     print(find_module(error))
        Linear(in_features=2, out_features=3, bias=True)
    """
    module = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            module = caller
    return module


# By a part of the name of an operation.
REPLACEMENTS = {
    "embedding_bag": "nn.Embedding and a sum, mean or max over the words, or ",
    "scaled_dot_product": "sdpa_kernel(SDPBackend.MATH), or ",
    "cudnn_rnn": "torch.backends.cudnn.flags(enabled=False), or ",
    "mkldnn_rnn": "torch.backends.mkldnn.flags(enabled=False), or ",
}

# By a pattern in the message of torch. {0} is the group of the pattern, an operation, or else the
# first line of the message. {1} is a replacement of the operation, and {2} is what to use for
# an operation without second derivatives.
ADVICE = {
    r"Sparse(?:CPU|CUDA| ?CS[RC]|Cs[rc]|Tensor)|[Ss]parse tensors?|\(sparse|_sparse_coo_tensor": (
        "sparse tensors: torch cannot split them by task, nor differentiate them again; use "
        "sparse=False in nn.Embedding and nn.EmbeddingBag, or dense tensors"
    ),
    r"derivative for '?(?:aten::)?_*([\w.]+)_backward'? is not implemented": (
        "{0}: torch has no second derivative of it; use {1}{2}"
    ),
    r"derivative for '?(?:aten::)?_*([\w.]+)'? is not implemented": (
        "{0}: torch has no derivative of it; replace it, or detach its inputs"
    ),
    r"is not differentiable with respect to argument": (
        "an argument of an operation has no derivative, but requires grad ({0}); detach it, or use "
        "it outside of the operation, as weights of classes after reduction='none'"
    ),
    r"aot_autograd does not currently support double backward|donated buffers": (
        "torch.compile: a compiled function has no second derivative; use the function that was "
        "compiled (a module has it in _orig_mod), vectorize='vmap', or {2}"
    ),
    r"forward AD with _*([\w.]+?)(?:_forward)? that does not support it": (
        "{0}: torch has no forward-mode derivative of it; use {1}" + REVERSE_MODE
    ),
    r"cudnn RNN backward can only be called in training mode": (
        "cudnn_rnn: it has no derivative in evaluation mode; use "
        "torch.backends.cudnn.flags(enabled=False), or model.train()"
    ),
    r"expected input and grad types to match": (
        "softmax: torch cannot vmap its gradient within an autocast to bfloat16 ({0}); use " + LOOP
    ),
    r"on the same device|type \(torch\.[A-Z]\w+\) and \w+ type \(torch\.cuda|"
    r"type \(torch\.cuda\.\w+\) and \w+ type \(torch\.[A-Z]": (
        "tensors on different devices meet ({0}); move the model, the data and what the losses "
        "hold to one device by .to(device)"
    ),
    r"must have the same dtype|expected scalar type|type \([\w.]+\) and \w+ type \([\w.]+\)": (
        "tensors of different types meet ({0}); convert the data, or the model, by .to(dtype), or "
        "if the parameters differ in type use 'unrolled' or curvature='gauss-newton'"
    ),
    r"stateless API can't be used with nn\.(\w+)": (
        "{0}: its parameters cannot be replaced by those of a task; use the module in it, .module"
    ),
    r"stateless API can't be used with Jitted": (
        "torch.jit: the parameters of a jitted module cannot be replaced by those of a task; use "
        "the module before torch.jit, whose parts may be jitted"
    ),
    r"[Bb]atching rule not implemented for (?:aten::)?([\w.:]*\w)": (
        "{0}: torch cannot vmap it; use " + LOOP
    ),
    r"must override the setup_context|does not have vmap support": (
        "torch.autograd.Function: torch.func cannot transform one without setup_context and "
        "generate_vmap_rule = True; add them, or use " + LOOP + " and " + REVERSE_MODE
    ),
    r"implement the jvp function for custom autograd|flat_bdims (?:must|is) not": (
        "torch.autograd.Function: torch has no forward-mode derivative of one without jvp; add it, "
        "or use " + REVERSE_MODE
    ),
    r"saved tensor hooks|tensor may have escaped|data pointer of Tensor that doesn't": (
        "torch.func cannot transform checkpointing, nor code that reads the memory of a tensor "
        "({0}); use " + LOOP + " and " + REVERSE_MODE
    ),
    r"output with shape .* doesn't match the broadcast shape": (
        "an in-place operation cannot write what differs between tasks to a tensor that they "
        "share ({0}); write to a new tensor, or use " + LOOP
    ),
    r"would mutate a captured Tensor": (
        "torch.func cannot transform a write to a buffer, as of running statistics ({0}); call "
        "model.eval(), use track_running_stats=False, or use " + LOOP + " and " + REVERSE_MODE
    ),
    r"element 0 of tensors does not require grad": (
        "a gradient has no graph ({0}): the model or a loss is behind detach() or no_grad(), or it "
        "calls torch.autograd.grad where vmap, forward mode or K-FAC record none; use "
        "torch.func.grad in it, or " + LOOP + " and " + REVERSE_MODE
    ),
    r"(?i)vmap|functorch|batching operators": (
        "torch.func cannot transform the model or a loss ({0}); use "
        + LOOP
        + " and "
        + REVERSE_MODE
    ),
}
