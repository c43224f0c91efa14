"""The outer problem of a run: its optimiser, its loss, and where its network starts."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from command_line import RunOptions, build_learner, build_optimizer, load_init, parse
from command_line.build import build_model
from scripts.running import SMALL, error_line, load_main

import tasks
from metaimplicit.training import Progress, read_sealed_json, save_checkpoint

LR = 0.1
DECAY = 0.5
FAMILY = tasks.load("sinusoid").train


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sgd_by_hand(p, gradients, decay):
    """Nesterov (1983), as Sutskever et al. (2013) have it and torch writes it."""
    momentum = torch.zeros_like(p)
    for g in gradients:
        g = g + decay * p
        momentum = 0.9 * momentum + g
        p = p - LR * (g + 0.9 * momentum)
    return p


def adam_by_hand(p, gradients, decay, decoupled=False):
    """Kingma and Ba (2015), and decoupled Loshchilov and Hutter (2019)."""
    first = torch.zeros_like(p)
    second = torch.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        if decoupled:
            p = p - LR * decay * p
        else:
            g = g + decay * p
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g**2
        scale = (second / (1 - 0.999**t)).sqrt() + 1e-8
        p = p - LR * first / (1 - 0.9**t) / scale
    return p


def adamw_by_hand(p, gradients, decay):
    return adam_by_hand(p, gradients, decay, decoupled=True)


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize(
    ("name", "by_hand"), [("sgd", sgd_by_hand), ("adam", adam_by_hand), ("adamw", adamw_by_hand)]
)
def test_the_outer_optimiser_takes_its_published_steps(name, by_hand, decay):
    options = parse(
        [
            f"--outer-optimizer={name}",
            f"--outer-lr={LR}",
            f"--outer-weight-decay={decay}",
            "--task=sinusoid",
            "--learn=lr",
            "--device=cpu",
        ]
    )
    learner = build_learner(options, FAMILY).double()
    optimizer = build_optimizer(options, learner)
    named = dict(learner.named_parameters())
    gradients = {key: torch.randn(3, *p.shape, dtype=p.dtype) for key, p in named.items()}
    expected = {}
    for key, p in named.items():
        decays = decay if key.startswith("model.") else 0.0  # the logarithm of lr does not
        expected[key] = by_hand(p.detach(), gradients[key], decays)
    assert any(key.startswith("learnt.") for key in named)

    for t in range(3):
        for key, p in named.items():
            p.grad = gradients[key][t].clone()
        optimizer.step()
    for key, p in named.items():
        assert (p - expected[key]).abs().max() <= 1e-12


def test_without_decay_the_optimiser_has_one_group_as_in_stored_runs():
    options = parse(["--task=sinusoid", "--learn=lr", "--device=cpu"])
    learner = build_learner(options, FAMILY)
    (group,) = build_optimizer(options, learner).param_groups
    assert len(group["params"]) == len(list(learner.parameters()))


def build_for_images(*args):
    options = parse(["--device=cpu", "--filters=4", "--norm=layer", "--vectorize=loop", *args])
    family = SimpleNamespace(kind="classification", input_shape=(1, 16, 16), outputs=3)
    torch.manual_seed(0)
    return build_learner(options, family).double()


def smooth_cross_entropy(outputs, targets, share):
    """Szegedy et al. (2016): the label has 1 − ε + ε/C, and every other class ε/C."""
    log_p = outputs - outputs.logsumexp(-1, keepdim=True)
    one_hot = torch.nn.functional.one_hot(targets, outputs.shape[-1]).double()
    smooth = (1 - share) * one_hot + share / outputs.shape[-1]
    return -(smooth * log_p).sum(-1).mean()


@pytest.mark.parametrize("args", [["--head=ridge"], ["--head=prototypes"], ["--method=cg"]])
def test_the_labels_of_the_query_set_alone_are_smooth(args):
    support = (torch.rand(2, 6, 1, 16, 16, dtype=torch.float64), torch.arange(3).repeat(2, 2))
    query = (torch.rand(2, 6, 1, 16, 16, dtype=torch.float64), torch.arange(3).repeat(2, 2))
    smooth = build_for_images(*args, "--label-smoothing=0.3")
    plain = build_for_images(*args)
    outputs = smooth.adapt(support, batched=True)(query[0])
    assert torch.equal(outputs, plain.adapt(support, batched=True)(query[0]))
    expected = smooth_cross_entropy(outputs, query[1], 0.3)
    step = smooth.backward((support, query))
    assert (step.loss - expected).abs() <= 1e-12
    plain_step = plain.backward((support, query))
    assert (plain_step.loss - smooth_cross_entropy(outputs, query[1], 0.0)).abs() <= 1e-12
    assert torch.equal(step.accuracy, plain_step.accuracy)


def test_values_have_no_labels_to_smooth():
    options = parse(["--task=sinusoid", "--label-smoothing=0.1", "--device=cpu"])
    with pytest.raises(ValueError, match=r"--label-smoothing: got 0.1 for regression, expected 0"):
        build_learner(options, FAMILY)
    with pytest.raises(ValueError, match=r"--label-smoothing: got 1.0, expected from 0 to 0.9"):
        parse(["--label-smoothing=1"])


class NoState:
    def state_dict(self):
        return {}


def save_run(folder, *args):
    """The checkpoint of a run before its first step."""
    learner = build_learner(parse(["--task=sinusoid", "--device=cpu", *args]), FAMILY)
    folder.mkdir(exist_ok=True)
    optimizer = torch.optim.Adam(learner.parameters())
    save_checkpoint(folder / "checkpoint.pt", learner, optimizer, NoState(), Progress())
    return learner


def test_a_run_starts_from_the_network_of_another(tmp_path, capsys):
    first = tmp_path / "first"
    second = tmp_path / "second"
    before = save_run(first).model.state_dict()
    given = ["--task=sinusoid", "--device=cpu", f"--init={first}", f"--out={second}"]
    options = parse(given)
    learner = build_learner(options, FAMILY)
    started = load_init(options, learner)
    assert all(torch.equal(x, before[name]) for name, x in learner.model.state_dict().items())
    assert f"--init: {first / 'checkpoint.pt'}: 6 tensors loaded\n" in capsys.readouterr().out
    assert len(started.identity()["init_digest"]) == 16
    assert RunOptions.load(json.loads(json.dumps(started.dump()))) == started
    assert replace(started, init=tmp_path).differences(started) == ["init"]
    assert load_init(started, learner) == started

    # Another network under the same name is another run.
    save_run(first)
    with pytest.raises(ValueError, match="has changed since the run was started"):
        load_init(started, learner)
    assert load_init(options, learner).init_digest != started.init_digest

    # With a checkpoint of its own, the run needs the other one no longer.
    (first / "checkpoint.pt").unlink()
    (first / "checkpoint-previous.pt").unlink()
    after = save_run(second).model.state_dict()
    learner.model.load_state_dict(after)
    resumed = replace(started, resume=True)
    assert load_init(resumed, learner) == resumed
    assert all(torch.equal(x, after[name]) for name, x in learner.model.state_dict().items())


@pytest.mark.slow
def test_what_a_run_started_from_is_part_of_it(tmp_path, capsys):
    train = load_main("train")
    first = tmp_path / "first"
    second = tmp_path / "second"
    save_run(first, "--seed=4")
    train([*SMALL, "--steps=1", "--seed=5", f"--init={first}", "--outer-lr=0", f"--out={second}"])
    before = torch.load(first / "checkpoint.pt", weights_only=True)["learner"]
    after = torch.load(second / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(x, before[name]) for name, x in after["learner"].items())
    config = read_sealed_json(second / "config.json")
    identity = json.loads(after["identity"])
    assert config["options"]["init_digest"] == identity["init_digest"] != ""
    shutil.rmtree(first)
    train(["--resume", f"--out={second}", "--steps=2"])
    load_main("evaluate")([str(second), "--episodes=2"])
    capsys.readouterr()
    line = error_line(train, ["--resume", f"--out={second}", f"--init={tmp_path}"], capsys)
    assert "--resume: got another init than the run's; leave that out" in line


def test_a_run_that_ended_before_its_first_step_starts_from_the_network_again(tmp_path):
    first = tmp_path / "first"
    second = tmp_path / "second"
    before = save_run(first).model.state_dict()
    save_run(second)
    given = ["--task=sinusoid", "--device=cpu", f"--init={first}", f"--out={second}"]
    options = parse(given)
    learner = build_learner(options, FAMILY)
    assert len(load_init(options, learner).init_digest) == 16
    assert all(torch.equal(x, before[name]) for name, x in learner.model.state_dict().items())


def test_blocks_are_joined_in_conv_alone():
    options = RunOptions(network="resnet-12", joined_blocks=2)
    with pytest.raises(ValueError, match="--joined-blocks: got 2 for the network resnet-12"):
        build_model(options, tasks.load("glyphs").train)
