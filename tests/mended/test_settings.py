"""What is mended is as it was when the last block ends, whatever happens in it."""

import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.backends import cuda, mha
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.mended import mended_derivatives, normalize


class Settings(NamedTuple):
    flash: bool
    efficient: bool
    cudnn: bool
    math: bool
    fast_path: bool
    functions: list


def settings():
    return Settings(
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        mha.get_fastpath_enabled(),
        [torch.embedding, torch._C._nn.mse_loss, torch._VF.lstm, torch._VF.gru],
    )


def assert_mended():
    *switches, functions = settings()
    assert switches == [False, False, False, True, False]
    assert {function.__module__ for function in functions} == {"metaimplicit.mended"}


def test_blocks_nest():
    before = settings()
    with mended_derivatives:
        with mended_derivatives:
            assert_mended()
        assert_mended()
    assert settings() == before


def test_an_error_leaves_nothing_behind():
    before = settings()
    with pytest.raises(KeyError), mended_derivatives:
        raise KeyError
    assert settings() == before


def test_what_the_user_had_chosen_comes_back():
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
            before = settings()
            with mended_derivatives:
                assert_mended()
            assert settings() == before
    finally:
        mha.set_fastpath_enabled(True)


def test_what_the_user_chooses_within_holds_for_that_long():
    with mended_derivatives:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert cuda.flash_sdp_enabled()
        assert_mended()


def test_threads_that_overlap_leave_nothing_behind():
    before = settings()
    entered, left = threading.Event(), threading.Event()

    def stay_until_the_other_has_left():
        with mended_derivatives:
            entered.set()
            left.wait(timeout=60)
            assert_mended()

    thread = threading.Thread(target=stay_until_the_other_has_left)
    with mended_derivatives:
        thread.start()
        assert entered.wait(timeout=60)
    left.set()
    thread.join()
    assert settings() == before


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_learner_leaves_nothing_behind(vectorize):
    before = settings()
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            seen.append(settings())
            if len(seen) > 2:
                raise KeyError
            return super().forward(x)

    learner = MetaLearner(
        Watching(2, 5), F.cross_entropy, inner=GradientDescent(steps=3), vectorize=vectorize
    )
    x, y = torch.randn(2, 5, 2), torch.arange(5).repeat(2, 1)
    with pytest.raises(KeyError):
        learner.adapt((x, y), batched=True)
    assert settings() == before
    assert not seen[-1].fast_path
    others = seen[-1]._replace(fast_path=before.fast_path)
    assert (others == before) is (vectorize == "loop")  # adapting in a loop is first order


def test_outside_of_transforms_the_operations_are_those_of_torch():
    weight = torch.randn(4, 2, requires_grad=True)
    words = torch.tensor([[0, 1], [1, 3]])
    with mended_derivatives:
        out = F.embedding(words, weight, padding_idx=1)
        loss = F.mse_loss(out, torch.zeros_like(out))
    assert type(out.grad_fn).__name__.startswith("Embedding")
    assert type(loss.grad_fn).__name__.startswith("MseLoss")


@pytest.mark.parametrize("affine", [True, False])
def test_the_formula_of_batch_normalisation_is_that_of_torch(affine):
    norm = nn.BatchNorm2d(3, affine=affine, dtype=torch.float64).eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 2.0)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    statistics = (norm.running_mean, norm.running_var)
    own = normalize(x, *statistics, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    torch.testing.assert_close(own, norm(x), rtol=1e-13, atol=1e-13)
