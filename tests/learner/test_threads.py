"""Threads that use one learner, whose model holds the parameters of one task at a time."""

import threading

import torch
from torch import nn
from torch.nn import functional as F

from metaimplicit import GradientDescent, MetaLearner

CALLS = 30


def test_threads_that_predict_and_train_do_not_see_the_parameters_of_one_another():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 400), nn.Tanh(), nn.Linear(400, 3))
    learner = MetaLearner(model, F.cross_entropy, inner=GradientDescent(steps=3, lr=1.0))
    x, y = torch.randn(2, 6, 200), torch.arange(6) % 3
    tasks = (x, torch.stack([y, y.roll(1)]))
    adapted = learner.adapt(tasks, batched=True)
    query = torch.randn(500, 200)
    expected = [adapted[i](query) for i in range(2)]
    before = [p.detach().clone() for p in model.parameters()]
    loss = learner.backward((tasks, tasks)).loss
    errors = []
    start = threading.Barrier(3)

    def compare(call, right):
        start.wait()
        try:
            for _ in range(CALLS):
                torch.testing.assert_close(call(), right)
        except Exception as error:
            errors.append(error)

    jobs = [(lambda i=i: adapted[i](query), expected[i]) for i in range(2)]
    jobs.append((lambda: learner.backward((tasks, tasks)).loss, loss))
    threads = [threading.Thread(target=compare, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
