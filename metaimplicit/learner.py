"""MetaLearner: the few-shot front door."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from metaimplicit.episodes import EpisodeBatch, Pair, accuracy, check_classes, check_pair
from metaimplicit.hypergradient import Hypergradient, hypergradient
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import Implicit, Method, Report, make_method
from metaimplicit.models import check_norms
from metaimplicit.params import Adapt, Params, select
from metaimplicit.problem import BilevelProblem, Composite, FromMeta, Proximal

Granularity = Literal["scalar", "per-tensor", "per-element"]
IMPLICIT_PROXIMAL = 2.0  # λ of implicit methods unless said otherwise (Rajeswaran et al. 2019)
_LEARNABLE = {"lr": "loop", "proximal": "loss"}  # what a method must reach to learn it


@dataclass(frozen=True)
class Step:
    """What `MetaLearner.backward` saw: the mean query loss, the query accuracy (None for regression), the report."""

    loss: Tensor
    accuracy: Tensor | None
    report: Report


class MetaLearner(nn.Module):
    """Learns the initialisation from which `inner` adapts `model` to a task's support set.

    min_φ mean_tasks loss(model_{θ*}(query)) with θ* = argmin_θ loss(model_θ(support)) + λ/2 ‖θ − φ‖² (Rajeswaran et
    al. 2019, eq. 4; λ = 0 and `unrolled` is MAML), φ being the model's parameters that require grad.

    Args:
        model: any module whose call on inputs `[m, ...]` gives outputs `[m, ...]`. Batch-norm normalises over each
            set it is given (transductive on the query), and must not track running statistics.
        loss: `(outputs, targets) -> scalar`, e.g. `F.cross_entropy`.
        inner: the inner loop, or its flag, e.g. "newton-cg".
        method: a flag or a `Method`; an implicit one takes Gauss–Newton curvature unless told otherwise.
        proximal: λ ≥ 0. If None, 2 for methods that see the initialisation through the inner loss alone (implicit
            ones), and 0 for all others.
        learn: inner numbers to learn beside φ, kept positive by learning their logarithm: "lr" (a scalar; with a
            mapping `{"lr": "per-tensor"}` one each, or `"per-element"`, Meta-SGD) and "proximal".
        adapt: which parameters adapt, a predicate, a glob or several; None, all. The rest are meta-learnt only.
        vectorize: "vmap", "loop", or "auto": both are timed on the first batch, and the faster is kept.
        chunk_size: tasks vmapped at a time, to bound memory.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        inner: str | InnerLoop = "gradient-descent",
        method: str | Method = "unrolled",
        proximal: float | None = None,
        learn: Iterable[str] | Mapping[str, Granularity] = (),
        adapt: Adapt = None,
        vectorize: Vectorize | Literal["auto"] = "auto",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        method = make_method(method)
        if proximal is None:
            proximal = 0.0 if "start" in method.reach else IMPLICIT_PROXIMAL
        if isinstance(method, Implicit) and method.curvature is None:
            method = replace(method, curvature="gauss-newton")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "model: got no parameter that requires grad, expected some; call model.requires_grad_()"
            )
        if vectorize not in ("auto", "vmap", "loop"):
            raise ValueError(f"vectorize: got {vectorize!r}, expected 'auto', 'vmap' or 'loop'")
        self.model, self.loss, self.method, self.inner = model, loss, method, make_inner(inner)
        self.adapted, self._trainable = select(trainable, adapt), set(trainable)
        self.vectorize, self.chunk_size = vectorize, chunk_size
        self._outputs: int | None = None  # the width of the model's output, for the range of labels
        self.learnt = nn.ParameterDict()
        self._keys: dict[str, str] = {}
        self.penalty = self._learn(learn, proximal, trainable)

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem of `hypergradient`; its data is `(support, query)`."""
        return BilevelProblem(
            init=lambda meta, _: {name: meta[name] for name in self.adapted},
            inner_loss=Composite(
                outputs=lambda params, meta, data: self._call(params, meta, data[0][0]),
                loss=lambda outputs, data: self.loss(outputs, data[0][1]),
                penalty=self.penalty,
                module=self.model,
            ),
            outer_loss=self._outer,
        )

    def backward(self, episodes: EpisodeBatch) -> Step:
        """Add the meta-gradient of the mean query loss over the batch to `.grad`, as `loss.backward()` would.

        Raises:
            ValueError: labels out of range or a class without support; an input with no gradient the method can give.
        """
        self._check(episodes)
        data, buffers = (episodes.support, episodes.query), self._written()
        if self.vectorize == "auto":
            self.vectorize = self._faster(data)
        result = self._hypergradient(data, self.vectorize)
        if moved := [
            name for name, seen in self._written().items() if buffers.get(name, seen) != seen
        ]:
            raise ValueError(
                f"model: a forward pass changed buffer {moved[0]!r}, so each task would see the ones before it; switch "
                "the module that does to evaluation mode"
            )
        for name, p in self._meta().items():
            if p.requires_grad:
                gradient = result.grads[name]
                p.grad = gradient if p.grad is None else p.grad + gradient
        return Step(result.outer_loss, accuracy(result.aux, episodes.query[1]), result.report)

    def evaluate(
        self, episodes: EpisodeBatch, steps: int | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Query loss and accuracy of each task along the inner loop, both `[counts, tasks]`.

        Args:
            episodes: a batch of tasks.
            steps: measure after 0, 1, …, `steps` inner steps; a sequence, after these numbers of them; None, after 0 …
                T of the inner loop.

        Returns:
            losses, and accuracies (None for regression).
        """
        counts = (
            range((self.inner.steps if steps is None else steps) + 1)
            if not isinstance(steps, Sequence)
            else steps
        )
        if not counts or min(counts) < 0:
            raise ValueError(f"steps: got {steps}, expected at least 0 inner steps")
        self._check(episodes)
        path = self._trajectory(episodes.support, max(counts))
        lifted = self._lift((episodes.support, episodes.query))
        meta = self._frozen()
        losses, accuracies = [], []
        with torch.no_grad():
            for count in counts:
                loss, outputs = lifted.outer(path[count], meta, lifted.data)
                losses.append(loss)
                accuracies.append(accuracy(outputs, episodes.query[1], mean=False))
        return torch.stack(losses), None if accuracies[0] is None else torch.stack(accuracies)  # type: ignore[arg-type]

    def adapt(
        self, support: Pair, *, steps: int | None = None, batched: bool = False
    ) -> AdaptedModel:
        """The model adapted to a support set (inputs and targets `[m, ...]`), or to one for each task if `batched`."""
        if steps is not None and steps < 0:
            raise ValueError(f"steps: got {steps}, expected at least 0 inner steps")
        if not batched:
            support = (support[0].unsqueeze(0), support[1].unsqueeze(0))
        check_pair("support", support)
        params = {name: p.detach() for name, p in self._trajectory(support, steps)[-1].items()}
        return AdaptedModel(
            self, params if batched else {name: p.squeeze(0) for name, p in params.items()}, batched
        )

    def _learn(
        self,
        learn: Iterable[str] | Mapping[str, Granularity],
        proximal: float,
        trainable: Mapping[str, Tensor],
    ) -> Proximal | None:
        """Make the learnt numbers parameters, point the inner loop at them, and return the penalty."""
        wanted = dict(learn) if isinstance(learn, Mapping) else dict.fromkeys(learn, "scalar")
        if unknown := sorted(set(wanted) - set(_LEARNABLE)):
            raise ValueError(f"learn: got {unknown}, expected some of {list(_LEARNABLE)}")
        for name, need in _LEARNABLE.items():
            if name in wanted and need not in self.method.reach:
                raise ValueError(
                    f"learn {name!r}: {self.method.flag} cannot give its gradient: {self.method.remedy}"
                )
        if not proximal >= 0:
            raise ValueError(f"proximal: got {proximal}, expected a strength ≥ 0")
        if proximal == 0 and "start" not in self.method.reach:
            raise ValueError(
                "proximal: got 0 with an implicit method, expected a strength > 0: without it θ* does not depend on "
                "the initialisation, and its gradient is zero"
            )
        granularity = wanted.get("lr")
        if granularity is not None:
            value = getattr(self.inner, "lr", None)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(
                    f"learn 'lr': got an inner loop with lr={value!r}, expected a number > 0 to start from"
                )
            shapes: dict[str, list[tuple[int, ...]]] = {
                "scalar": [()],
                "per-tensor": [()] * len(self.adapted),
                "per-element": [tuple(trainable[name].shape) for name in self.adapted],
            }
            if granularity not in shapes:
                raise ValueError(f"learn 'lr': got {granularity!r}, expected one of {list(shapes)}")
            names = (
                ["log_lr"]
                if granularity == "scalar"
                else [f"log_lr.{name}" for name in self.adapted]
            )
            like = trainable[self.adapted[0]]
            for name, shape in zip(names, shapes[granularity], strict=True):
                self._add(
                    name,
                    torch.full(shape, float(value), dtype=like.dtype, device=like.device).log(),
                )
            self.inner = self.inner.updated(lr=FromMeta("log_lr", torch.exp))
        if "proximal" not in wanted:
            return Proximal(proximal) if proximal > 0 else None
        if wanted["proximal"] != "scalar":
            raise ValueError(f"learn 'proximal': got {wanted['proximal']!r}, expected 'scalar'")
        if proximal == 0:
            raise ValueError(
                "learn 'proximal': got proximal=0, expected a strength > 0 to start from"
            )
        like = next(iter(trainable.values()))
        self._add(
            "log_proximal", torch.tensor(proximal, dtype=like.dtype, device=like.device).log()
        )
        return Proximal(FromMeta("log_proximal", torch.exp))

    def _add(self, name: str, value: Tensor) -> None:
        if name in dict(self.model.named_parameters()):
            raise ValueError(
                f"learn: the model has a parameter {name!r} already, expected that name to be free; rename it"
            )
        key = name.replace(".", "/")  # a parameter's own name may not hold a dot
        self.learnt[key], self._keys[name] = nn.Parameter(value), key

    def _written(self) -> dict[str, tuple[int, int]]:
        """Which tensor each buffer of the model is, and how often it was written."""
        return {name: (id(buffer), buffer._version) for name, buffer in self.model.named_buffers()}

    def _meta(self) -> Params:
        """φ: the model's trainable parameters and the learnt numbers, by name."""
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if params.keys() != self._trainable:
            changed = sorted(params.keys() ^ self._trainable)
            raise ValueError(
                f"model: {changed[0]!r} was frozen or unfrozen after the learner was built, expected the parameters as "
                "they were; build it anew"
            )
        return params | {name: self.learnt[key] for name, key in self._keys.items()}

    def _frozen(self) -> Params:
        return {name: p.detach() for name, p in self._meta().items()}

    def _call(self, params: Params, meta: Params, inputs: Tensor) -> Tensor:
        merged = {name: m for name, m in meta.items() if name not in self._keys} | params
        outputs = torch.func.functional_call(self.model, merged, (inputs,))
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"model: got a call that returns {type(outputs).__name__}, expected one tensor; wrap it"
            )
        return outputs

    def _outer(
        self, params: Params, meta: Params, data: tuple[Pair, Pair]
    ) -> tuple[Tensor, Tensor]:
        outputs = self._call(params, meta, data[1][0])
        return self.loss(outputs, data[1][1]), outputs

    def _hypergradient(self, data: tuple[Pair, Pair], vectorize: Vectorize) -> Hypergradient:
        return hypergradient(
            self.problem,
            self._meta(),
            data,
            inner=self.inner,
            method=self.method,
            batched=True,
            vectorize=vectorize,
            chunk_size=self.chunk_size,
        )

    def _lift(self, data: object, vectorize: Vectorize | None = None) -> LiftedProblem:
        how: Vectorize = vectorize or ("loop" if self.vectorize == "loop" else "vmap")
        return LiftedProblem(
            self.problem, data, batched=True, vectorize=how, chunk_size=self.chunk_size
        )

    def _trajectory(self, support: Pair, steps: int | None) -> tuple[Params, ...]:
        """The iterates θ_0 … θ_steps, the last one repeated where the loop stopped before."""
        check_norms(self.model)
        steps = self.inner.steps if steps is None else steps
        try:
            return self._iterates(self._lift((support, support)), steps)
        except RuntimeError:
            if self.vectorize != "auto":
                raise
        path = self._iterates(self._lift((support, support), "loop"), steps)
        self.vectorize = "loop"  # nothing was timed yet, and this model cannot be vmapped
        return path

    def _iterates(self, lifted: LiftedProblem, steps: int) -> tuple[Params, ...]:
        meta = self._frozen()
        with torch.enable_grad():
            path = (
                self.inner.updated(steps=max(steps, 1))
                .run(
                    lambda params, _: lifted.inner(params, meta, lifted.data),
                    lifted.init(meta),
                    meta,
                    differentiated_steps=0,
                    keep_iterates=True,
                )
                .iterates
            )
        return (path + path[-1:] * (steps + 1 - len(path)))[: steps + 1]

    def _faster(self, data: tuple[Pair, Pair]) -> Vectorize:
        """Time vmap and the loop on a batch, leaving the random state as it was; the loop where vmap is impossible."""
        generator = getattr(getattr(self.method, "solver", None), "generator", None)
        state = None if generator is None else generator.get_state()
        seconds: dict[str, float] = {}
        with torch.random.fork_rng(
            devices=range(torch.cuda.device_count()) if data[0][0].is_cuda else []
        ):
            for how in ("loop", "vmap"):
                try:
                    seconds[how] = min(self._time(data, how) for _ in range(2))
                except RuntimeError:  # an operation without a batching rule
                    if how == "loop":
                        raise
        if generator is not None:
            generator.set_state(state)
        return "vmap" if seconds.get("vmap", torch.inf) <= seconds["loop"] else "loop"

    def _time(self, data: tuple[Pair, Pair], vectorize: Vectorize) -> float:
        start = time.perf_counter()
        float(
            self._hypergradient(data, vectorize).outer_loss
        )  # reading a number waits for the device
        return time.perf_counter() - start

    def _check(self, episodes: EpisodeBatch) -> None:
        check_norms(self.model)
        for name, pair in {
            "episodes.support": episodes.support,
            "episodes.query": episodes.query,
        }.items():
            check_pair(name, pair)
        if not episodes.support[1].is_floating_point():
            if self._outputs is None:
                with torch.no_grad():
                    self._outputs = self._call({}, self._frozen(), episodes.support[0][0]).shape[1]
            check_classes(episodes.support[1], episodes.query[1], self._outputs)


class AdaptedModel:
    """A model with adapted parameters: `inputs [m, ...] -> outputs`, or `[tasks, m, ...]` if it holds a batch of tasks.

    Attributes:
        params: the adapted parameters, `{name: [*shape]}` or `{name: [tasks, *shape]}`; the others are the learner's.
    """

    def __init__(self, learner: MetaLearner, params: Params, batched: bool) -> None:
        self.params, self._learner, self._batched = params, learner, batched

    def __call__(self, inputs: Tensor) -> Tensor:
        meta = self._learner._frozen()
        if not self._batched:
            return self._learner._call(self.params, meta, inputs)
        outputs: Tensor = self._learner._lift(inputs).apply(
            lambda params, x: self._learner._call(params, meta, x), self.params
        )
        return outputs

    def __len__(self) -> int:
        return len(next(iter(self.params.values()))) if self._batched else 1

    def __getitem__(self, task: int) -> AdaptedModel:
        """The model of one task of a batch."""
        if not self._batched:
            raise TypeError("this model holds one task; adapt with batched=True for several")
        return AdaptedModel(
            self._learner, {name: p[task] for name, p in self.params.items()}, batched=False
        )
