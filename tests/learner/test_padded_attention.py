"""Encoders in `eval()`, whose fast path sets padded outputs to zero and has no derivative."""

import pytest
import torch
from oracles import randn
from torch import nn
from torch.nn import functional as F

from metaimplicit import BilevelProblem, GradientDescent, MetaLearner, hypergradient


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x, padding):
        return self.head(self.body(x, src_key_padding_mask=padding).mean(1))


PADDING = torch.arange(5) >= torch.tensor([2, 3, 5, 4, 2, 5]).unsqueeze(1)
LABELS = torch.arange(6) % 3
INNER = GradientDescent(steps=2, lr=0.1)
SETS = ((randn(2, 6, 5, 4, seed=1), PADDING.expand(2, 6, 5)), LABELS.expand(2, 6))


@pytest.mark.parametrize(
    "options",
    [{"inner": INNER}, {"inner": INNER, "adapt": "head.*"}, {"head": "ridge"}],
    ids=["all", "head", "ridge"],
)
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_every_call_computes_what_training_does(options, vectorize):
    torch.manual_seed(0)
    model = Encoder().double().eval()
    learner = MetaLearner(model, F.cross_entropy, vectorize=vectorize, **options)
    expected = learner.backward((SETS, SETS)).loss
    evaluated = learner.evaluate((SETS, SETS))[0][-1].mean()
    adapted = learner.adapt(SETS, batched=True)
    outputs = adapted(*SETS[0])
    predicted = torch.stack([F.cross_entropy(z, LABELS) for z in outputs]).mean()
    of_one_task = adapted[0](*(x[0] for x in SETS[0]))
    torch.testing.assert_close([evaluated, predicted], 2 * [expected], rtol=1e-12, atol=0)
    torch.testing.assert_close(of_one_task, outputs[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["unrolled", "first-order"])
def test_a_problem_of_a_user_computes_what_training_does(method):
    torch.manual_seed(0)
    model = Encoder().double().eval()
    inputs = tuple(x[0] for x in SETS[0])

    def loss(params, meta, data):
        return F.cross_entropy(torch.func.functional_call(model, params, inputs), LABELS)

    problem = BilevelProblem(lambda meta, data: dict(meta), loss, loss)
    meta = {name: p.detach() for name, p in model.named_parameters()}
    inner = GradientDescent(steps=1, lr=0.1)
    result = hypergradient(problem, meta, None, inner=inner, method=method)
    expected = {name: p.clone().requires_grad_() for name, p in meta.items()}
    slopes = torch.autograd.grad(loss(expected, None, None), list(expected.values()))
    moved = {n: p - 0.1 * g for (n, p), g in zip(expected.items(), slopes, strict=True)}
    torch.testing.assert_close(result.outer_loss, loss(moved, None, None), rtol=1e-12, atol=0)
