"""Meta-gradients by loops over the tasks in plain torch, with dense matrices."""

import torch
from torch.func import functional_call

STEPS, LR, PROXIMAL = 2, 0.05, 5.0


def inner_loss(model, loss, params, start, pair):
    """f = loss on the support set + λ/2 ‖θ − φ‖²."""
    inputs, targets = pair
    distance = sum((p - start[name]).square().sum() for name, p in params.items())
    return loss(functional_call(model, params, (inputs,)), targets) + PROXIMAL / 2 * distance


def adapt(model, loss, start, pair, *, create_graph):
    """Gradient descent from `start`; without a graph, `start` is a constant in the result."""
    params = dict(start)
    if not create_graph:
        params = {name: p.detach().requires_grad_() for name, p in start.items()}
    anchor = start if create_graph else {name: p.detach() for name, p in start.items()}
    for _ in range(STEPS):
        f = inner_loss(model, loss, params, anchor, pair)
        gradients = torch.autograd.grad(f, list(params.values()), create_graph=create_graph)
        stepped = {name: p - LR * g for (name, p), g in zip(params.items(), gradients, strict=True)}
        params = stepped
        if not create_graph:
            params = {name: p.detach().requires_grad_() for name, p in stepped.items()}
    return params


def unrolled(model, loss, support, query):
    start = dict(model.named_parameters())
    total = 0
    for pair, (inputs, targets) in zip(support, query, strict=True):
        params = adapt(model, loss, start, pair, create_graph=True)
        total = total + loss(functional_call(model, params, (inputs,)), targets) / len(support)
    return flat(torch.autograd.grad(total, list(start.values())))


def first_order(model, loss, support, query):
    return sum(
        query_gradient(model, loss, adapted(model, loss, pair), task)
        for pair, task in zip(support, query, strict=True)
    ) / len(support)


def gauss_newton(model, loss, support, query, shift=0.0):
    """λ (JᵀHJ + (λ + shift) I)⁻¹ v for each task, by dense matrices."""
    return sum(
        PROXIMAL * solve(model, loss, adapted(model, loss, pair), pair, task, shift)
        for pair, task in zip(support, query, strict=True)
    ) / len(support)


def damped_gauss_newton(model, loss, support, query):
    return gauss_newton(model, loss, support, query, shift=0.5)


def solve(model, loss, params, pair, task, shift):
    inputs, targets = pair
    theta = flat(params.values())

    def outputs(vector):
        return functional_call(model, unflat(vector, params), (inputs,))

    z = outputs(theta).detach()
    jacobian = torch.autograd.functional.jacobian(outputs, theta, vectorize=True)
    jacobian = jacobian.reshape(z.numel(), -1)
    hessian = torch.autograd.functional.hessian(lambda x: loss(x, targets), z, vectorize=True)
    core = jacobian.T @ hessian.reshape(z.numel(), z.numel()) @ jacobian
    a = core + (PROXIMAL + shift) * torch.eye(len(theta))
    return torch.linalg.solve(a, query_gradient(model, loss, params, task))


def hessian(model, loss, support, query):
    """The adjoint iteration's limit: λ (∂²f/∂θ²)⁻¹ v at θ_T."""
    total = 0
    for pair, task in zip(support, query, strict=True):
        params = adapted(model, loss, pair)
        theta = flat(params.values())
        anchor = {name: p.detach() for name, p in params.items()}

        def f(vector, params=params, anchor=anchor, pair=pair):
            return inner_loss(model, loss, unflat(vector, params), anchor, pair)

        a = torch.autograd.functional.hessian(f, theta, vectorize=True)
        total = total + PROXIMAL * torch.linalg.solve(a, query_gradient(model, loss, params, task))
    return total / len(support)


def adapted(model, loss, pair):
    return adapt(model, loss, dict(model.named_parameters()), pair, create_graph=False)


def query_gradient(model, loss, params, task):
    inputs, targets = task
    value = loss(functional_call(model, params, (inputs,)), targets)
    return flat(torch.autograd.grad(value, list(params.values())))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).detach()


def unflat(vector, like):
    parts = vector.split([p.numel() for p in like.values()])
    return {name: x.reshape(p.shape) for (name, p), x in zip(like.items(), parts, strict=True)}
