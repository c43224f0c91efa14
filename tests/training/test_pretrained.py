"""Networks that start from the checkpoint of another run."""

import re

import pytest
import torch
from torch import nn

from metaimplicit import MetaLearner
from metaimplicit.models import MLP, ConvNet
from metaimplicit.training import Progress, load_pretrained, save_checkpoint

SHAPE = (1, 16, 16)


class NoState:
    def state_dict(self):
        return {}


def conv(outputs, **options):
    return ConvNet(SHAPE, outputs, **({"filters": 4, "norm": "running"} | options))


def save(model, path):
    """The checkpoint of a run with a network whose tensors are all random."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    adapt = None if any("running" in n for n, _ in model.named_buffers()) else "*"
    learner = MetaLearner(model, nn.functional.cross_entropy, adapt=adapt)
    optimizer = torch.optim.Adam(learner.parameters())
    save_checkpoint(path / "checkpoint.pt", learner, optimizer, NoState(), Progress())
    return model.state_dict()


def test_all_parameters_and_buffers_of_the_same_network_are_loaded(tmp_path):
    stored = save(conv(5), tmp_path)
    new = conv(5)
    pretrained = load_pretrained(tmp_path, new, head="head")
    assert pretrained.loaded == list(stored)
    assert pretrained.left_out == []
    assert any("running_var" in name for name in stored)
    assert all(torch.equal(x, stored[name]) for name, x in new.state_dict().items())
    assert str(pretrained) == f"{tmp_path / 'checkpoint.pt'}: {len(stored)} tensors loaded"


@pytest.mark.parametrize(("before", "after"), [(5, 20), (5, None), (None, 5)])
def test_a_last_layer_that_does_not_fit_is_left_out(before, after, tmp_path):
    stored = save(conv(before), tmp_path)
    new = conv(after)
    initial = {name: x.clone() for name, x in new.state_dict().items()}
    pretrained = load_pretrained(tmp_path / "checkpoint.pt", new, head=new.head_name)
    assert pretrained.left_out == ["head.weight", "head.bias"]
    assert str(pretrained).endswith("; the last layer left out (head.weight, head.bias)")
    for name, x in new.state_dict().items():
        expected = initial if name.startswith("head.") else stored
        assert torch.equal(x, expected[name])


@pytest.mark.parametrize(("before", "after"), [(1, 3), (1, None), (None, 1)])
def test_the_last_layer_of_an_mlp_likewise(before, after, tmp_path):
    stored = save(MLP((2, 3), before, hidden=(4,)), tmp_path)
    new = MLP((2, 3), after, hidden=(4,))
    pretrained = load_pretrained(tmp_path, new, head=new.head_name)
    assert pretrained.loaded == ["1.weight", "1.bias"]
    assert pretrained.left_out == ["3.weight", "3.bias"]
    assert torch.equal(new[1].weight, stored["1.weight"])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            conv(5),
            conv(5, filters=8),
            "of another shape: features.0.weight (4, 1, 3, 3) for (8, 1, 3, 3), features.0.bias "
            "(4,) for (8,), ",
        ),
        (
            conv(5, norm="batch"),
            conv(5),
            "missing: features.1.running_mean, features.1.running_var, ",
        ),
        (conv(5), conv(5, norm="group"), "unexpected: features.1.running_mean, "),
        (
            MLP(3, 2, hidden=(4,)),
            MLP(3, 2, hidden=(4, 4)),
            "of another shape: 2.weight (2, 4) for (4, 4), 2.bias (2,) for (4,)",
        ),
    ],
)
def test_other_networks_are_refused_by_the_names_of_their_tensors(before, after, message, tmp_path):
    save(before, tmp_path)
    initial = {name: x.clone() for name, x in after.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(f"does not fit the network ({message}")):
        load_pretrained(tmp_path, after, head=after.head_name)
    assert all(torch.equal(x, initial[name]) for name, x in after.state_dict().items())


def test_the_digest_is_that_of_the_content(tmp_path):
    first, second, third = (tmp_path / name for name in ("a", "b", "c"))
    for folder in (first, second, third):
        folder.mkdir()
    network = conv(5)
    save(network, first)
    (second / "checkpoint.pt").write_bytes((first / "checkpoint.pt").read_bytes())
    save(network, third)
    digests = [load_pretrained(x, conv(5), head="head").digest for x in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint: found no .*none\.pt"):
        load_pretrained(tmp_path / "none.pt", conv(5), head="head")
    torch.save(conv(5).state_dict(), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: got no checksum at the end"):
        load_pretrained(tmp_path, conv(5), head="head")
