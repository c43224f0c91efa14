"""A network that starts from the checkpoint of another run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from metaimplicit.params import Params
from metaimplicit.training.rotation import read_checkpoint
from metaimplicit.training.run_folder import CHECKPOINT
from metaimplicit.training.sealed import digest, read_sealed

PREFIX = "model."  # of the network's tensors in the state of a learner
NAMED = 6  # tensors of a kind in an error


class Pretrained(NamedTuple):
    """What was loaded into a network.

    Attributes:
        path: The checkpoint.
        digest: 16 hexadecimal digits that identify its content.
        loaded: The names of the parameters and buffers that were loaded.
        left_out: Those of the last layer, if it does not fit.

    Example:
        >>> print(Pretrained(Path("a.pt"), "e3b0c44298fc1c14", ["0.weight"], ["2.weight"]))
        a.pt: 1 tensor loaded; the last layer left out (2.weight)
    """

    path: Path
    digest: str
    loaded: list[str]
    left_out: list[str]

    def __str__(self) -> str:
        tensors = "tensor" if len(self.loaded) == 1 else "tensors"
        text = f"{self.path}: {len(self.loaded)} {tensors} loaded"
        if self.left_out:
            text += f"; the last layer left out ({', '.join(self.left_out)})"
        return text


def load_pretrained(path: str | Path, model: nn.Module, *, head: str) -> Pretrained:
    """Load the parameters and buffers of the network of another run.

    Its last layer is left out if it has other shapes or only one of the networks has it. All other
    tensors must have the same names and shapes.

    Args:
        path: A checkpoint, or the folder of a run, of which the last one is taken.
        model: The network.
        head: The name of its last layer. The module need not exist.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint is damaged, or does not fit the network. The message names the
            tensors.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import tasks
        >>> from metaimplicit import MetaLearner
        >>> from metaimplicit.models import MLP
        >>> from metaimplicit.training import Budget, fit
        >>> sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=2)
        >>> learner = MetaLearner(MLP(1, 1, hidden=(4,)), nn.functional.mse_loss)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> new = MLP(1, 3, hidden=(4,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = Path(folder)
        ...     _ = fit(learner, optimizer, sampler, out=out, budget=Budget(steps=3), bar=False)
        ...     load_pretrained(out, new, head=new.head_name).loaded
        ['0.weight', '0.bias']
    """
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    own = model.state_dict()
    loaded = read_checkpoint(path, None, next(iter(own.values())).device)
    stored: Params = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in loaded.state.get("learner", {}).items()
        if name.startswith(PREFIX)
    }
    misfits = _find_misfits(own, stored)
    of_head = {name for name in {**own, **stored} if name.startswith(f"{head}.")}
    _require_fit(misfits, of_head, loaded.path)

    keeps_head = not any(of_head & names.keys() for names in misfits.values())
    left_out = [] if keeps_head else [name for name in {**own, **stored} if name in of_head]
    names = [name for name in own if name not in left_out]
    model.load_state_dict({name: stored[name] for name in names}, strict=False)
    content = digest(read_sealed(loaded.path)).decode()
    return Pretrained(loaded.path, content, names, left_out)


def _find_misfits(own: Params, stored: Params) -> dict[str, dict[str, str]]:
    """The tensors that do not fit, by what is wrong with them, with what an error says of each."""
    shapes = {
        name: f"{name} {tuple(stored[name].shape)} for {tuple(x.shape)}"
        for name, x in own.items()
        if name in stored and stored[name].shape != x.shape
    }
    return {
        "missing": {name: name for name in own if name not in stored},
        "unexpected": {name: name for name in stored if name not in own},
        "of another shape": shapes,
    }


def _require_fit(misfits: dict[str, dict[str, str]], of_head: set[str], path: Path) -> None:
    """Check that all tensors fit but those of the last layer.

    Args:
        misfits: What does not fit, by kind: the name of each tensor, and how the message names it.
        of_head: The names of the last layer's tensors, which may differ.
        path: The file of the parameters.

    Raises:
        ValueError: Another tensor does not fit.
    """
    objections = []
    for kind, names in misfits.items():
        texts = [text for name, text in names.items() if name not in of_head]
        if texts:
            more = ", …" if len(texts) > NAMED else ""
            objections.append(f"{kind}: {', '.join(texts[:NAMED])}{more}")
    if objections:
        raise ValueError(
            f"init: {path} does not fit the network ({'; '.join(objections)}); build the network "
            "as that run did"
        )
