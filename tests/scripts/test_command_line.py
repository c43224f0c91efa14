"""The options of train.py: their defaults, the flags of methods, and what is built from them."""

import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import RunOptions, build_learner, default_options, parse
from command_line.flags import inner_flags, method_flags
from command_line.options import ADDED
from scripts.running import load_main

import tasks
from metaimplicit import METHODS, GradientDescent, NewtonCG
from metaimplicit.inner import INNER_LOOPS, Newton, NoSteps, Ridge, make_inner
from metaimplicit.methods import make_method
from metaimplicit.training import write_sealed_json

HIDDEN = ("method_options", "inner_options", "init_digest")
RUN_FLAGS = [f.name for f in fields(RunOptions) if f.name not in HIDDEN]


def build(*args):
    """The learner of a command line for sinusoid tasks."""
    options = parse(["--task=sinusoid", "--device=cpu", *args])
    return build_learner(options, tasks.load("sinusoid").train)


def help_of(main, args, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*args, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def assert_explained(text, names):
    """Between each flag with its metavar and its default stand words of explanation."""
    text = re.sub(r"[\s│]+", " ", text)
    for name in names:
        flag = rf"--(?:no-)?{name.replace('_', '-')}"
        between = re.search(rf"{flag} ([^│]*?)\(default", text).group(1)
        words = [word for word in between.split() if not word.startswith(("{", "["))]
        assert any(re.search("[a-zμ]", word) for word in words), name


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_method_is_built_from_its_own_options():
    assert build("--method=nystrom", "--rank=20").method.solver.rank == 20
    cg = build("--method=cg", "--solver-steps=7", "--damping=0.5", "--strict").method
    assert (cg.solver.max_steps, cg.damping, cg.strict) == (7, 0.5, True)
    assert build("--method=cg", "--curvature=hessian").method.curvature == "hessian"
    assert build("--method=neumann", "--scale=0.25").method.solver.scale == 0.25
    assert build("--method=nystrom", "--rho", "0.1").method.solver.rho == 0.1
    assert build("--method=f2sa", "--penalty=3").method.strength == 3.0
    assert build("--method=soba", "--no-warm").method.solver.warm is False


@pytest.mark.parametrize("flag", METHODS)
def test_a_run_has_the_defaults_of_its_method(flag):
    options = parse([f"--method={flag}"])
    assert options.method_options == {}
    assert make_method(options.method, **options.method_options) == METHODS[flag]
    assert build(f"--method={flag}").method.flag == METHODS[flag].flag


@pytest.mark.parametrize(
    "command",
    [
        ["--task=sinusoid", "--method=cg", "--strict", "--check-curvature"],
        ["--task=sinusoid", "--method=amigo", "--no-warm"],
        ["--task=glyphs", "--augment", "--pool"],
    ],
    ids=" ".join,
)
def test_the_command_of_a_run_is_repeated_to_resume_it(command, tmp_path):
    """A flag that is stored as given may be given again."""
    args = [f"--out={tmp_path}", *command]
    options = parse(args)
    write_sealed_json(tmp_path / "config.json", {"options": options.dump()})
    resumed = parse([*args, "--resume"])
    assert resumed.dump() | {"resume": False} == options.dump() | {"resume": False}


def test_a_run_stores_the_options_of_its_method_that_were_given():
    options = parse(["--method=nystrom", "--rank=20", "--rho=0.1", "--refresh=1"])
    assert options.method_options == {"rank": 20, "rho": 0.1}
    stored = json.loads(json.dumps(options.dump()))
    assert RunOptions.load(stored) == options


def test_the_inner_optimizer_is_a_row_of_the_registry_with_its_own_options():
    assert build("--inner-optimizer=momentum").inner == make_inner("momentum").updated(
        steps=1, lr=0.01
    )
    newton = ["--method=cg", "--inner-optimizer=newton-cg", "--inner-steps=5"]
    assert build(*newton).inner == NewtonCG(steps=5, cg_steps=3)
    assert build(*newton, "--inner-cg-steps=7").inner == NewtonCG(steps=5, cg_steps=7)
    assert build(*newton, "--inner-cg-steps=10").inner == NewtonCG(steps=5, cg_steps=10)
    lbfgs = build("--method=cg", "--inner-optimizer=lbfgs", "--inner-steps=50").inner
    assert lbfgs == make_inner("lbfgs").updated(steps=50)


def build_for_images(*args):
    """The learner of a command line for tasks of small images."""
    options = parse(["--device=cpu", "--filters=4", *args])
    family = SimpleNamespace(kind="classification", input_shape=(1, 28, 28), outputs=5)
    return build_learner(options, family)


@pytest.mark.parametrize(
    ("head", "loop", "flag", "learn"),
    [
        ("ridge", Ridge(), "auto", {"log_lambda", "log_scale"}),
        ("logistic", Newton(), "auto", {"log_lambda", "log_scale"}),
        ("hinge", Newton(), "auto", {"log_lambda", "log_scale"}),
        ("prototypes", NoSteps(), "unrolled", {"log_temperature"}),
    ],
)
def test_a_head_has_its_own_loop_method_and_learnt_numbers(head, loop, flag, learn):
    learner = build_for_images(f"--head={head}")
    assert learner.inner == loop
    assert type(learner.method) is type(METHODS[flag])
    assert set(learner.learnt.by_name()) == learn
    assert learner.adapted == []
    assert learner.model.head is None
    assert parse([f"--head={head}"]).test_steps == (0 if head == "prototypes" else 1)


def test_prototypes_may_adapt_as_proto_maml_does():
    args = ["--head=prototypes", "--inner-optimizer=gradient-descent", "--inner-steps=3"]
    learner = build_for_images(*args, "--adapt=all")
    assert learner.inner == GradientDescent(steps=3, lr=0.5)
    assert learner.adapted == [name for name, _ in learner.model.named_parameters()]
    assert build_for_images(*args).adapted == []


def test_the_last_layer_adapts_alone():
    assert build_for_images("--adapt=head").adapted == ["head.weight", "head.bias"]
    assert build("--adapt=head").adapted == ["4.weight", "4.bias"]


@pytest.mark.parametrize(
    ("norm", "layer"),
    [("batch", "BatchNorm"), ("running", "BatchNorm2d"), ("group", "GroupNorm")],
)
def test_the_normalisation_is_chosen(norm, layer):
    learner = build_for_images(f"--norm={norm}")
    assert type(learner.model.features[1]).__name__ == layer


def test_the_network_is_chosen_by_its_name():
    r2d2 = build_for_images("--network=conv", "--filters", "4", "8", "8", "16", "--pool")
    assert [r2d2.model.features[i].out_channels for i in (0, 4, 8, 12)] == [4, 8, 8, 16]
    resnet = build_for_images("--network=resnet-12", "--adapt=head", "--norm=group").model
    assert [type(resnet).__name__, resnet.head.in_features] == ["ResNet12", 4]
    mlp = build_for_images("--network=mlp", "--adapt=head", "--hidden", "6")
    assert mlp.adapted == ["3.weight", "3.bias"]
    options = parse(["--network=resnet-12"])
    assert (options.filters, options.activation) == ((64, 160, 320, 640), "leaky-relu")
    with pytest.raises(ValueError, match="input_shape"):
        build("--network=conv")
    with pytest.raises(ValueError, match="--filters: got 0, expected from 1 to 4096"):
        parse(["--filters", "4", "8", "0", "8"])


def test_a_linear_layer_has_one_number_of_classes():
    options = parse(["--head=ridge", "--train-ways=20", "--train-shots=2"])
    assert (options.task_arguments()["ways"], options.task_arguments()["shots"]) == (5, 1)
    assert (options.training_arguments()["ways"], options.training_arguments()["shots"]) == (20, 2)
    with pytest.raises(ValueError, match="--train-ways: got 20 with --ways 5 and --head linear"):
        parse(["--head=linear", "--train-ways=20"]).training_arguments()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--method=cg", "--rank", "20"],
            "--rank: got it with --method cg, .* "
            "expected --method nystrom, nystrom-gaussian.* nystrom-cg",
        ),
        (["--rho=1"], "--rho: got it with --method auto, .* kfac, ekfac.* or "),
        (["--method=unrolled", "--strict"], "--strict: got it with --method unrolled"),
        (["--no-warm"], "--no-warm: got it with --method auto, .* t1-t2, soba.* or "),
        (
            ["--inner-cg-steps=3"],
            "--inner-cg-steps: got it with --inner-optimizer ridge, .* newton-cg",
        ),
        (["--method=newton"], f"method: got 'newton', expected one of {', '.join(METHODS)}"),
        (["--inner-optimizer=sgd"], "inner: got 'sgd', expected one of gradient-descent"),
        (["--method=neumann", "--scale=nan"], "--scale: got nan, expected from 0 to "),
    ],
)
def test_a_flag_of_another_method_is_an_error_that_names_the_methods_that_have_it(args, message):
    with pytest.raises(ValueError, match=message):
        parse(args)


def test_no_flag_of_a_method_or_an_inner_loop_is_one_of_the_run():
    for flag in METHODS:
        assert not set(method_flags(flag).options) & set(RUN_FLAGS)
    for flag in INNER_LOOPS:
        assert not set(inner_flags(flag).options) & set(RUN_FLAGS)


@pytest.mark.parametrize("method", ["cg", "nystrom", "f2sa"])
def test_help_explains_every_option_of_the_run_and_of_the_chosen_method(method, capsys):
    text = help_of(load_main("train"), ["--method", method], capsys)
    assert_explained(text, [*RUN_FLAGS, *method_flags(method).options, "inner_momentum"])
    assert "--method-options" not in text


def test_help_lists_the_options_of_the_other_methods(capsys):
    text = help_of(load_main("train"), ["--method=cg"], capsys)
    assert "- nystrom: --rank --rho" in text
    assert "- soba: --scale --no-warm" in text
    assert "- all implicit methods: --curvature --damping" in text
    assert "- cg:" not in text


def test_help_shows_the_defaults_of_the_task_and_the_method(capsys):
    text = help_of(load_main("train"), ["--task=sinusoid", "--method=cg"], capsys)
    assert re.search(r"--inner-steps INT[^-]*\(default: 32\)", text)
    of_solver = text.partition("--solver-steps INT")[2].partition(" --")[0]
    assert re.search(r"\(default:\s+│?\s*│?\s*10\)", of_solver)


def test_help_of_evaluate_explains_its_options(capsys):
    text = help_of(load_main("evaluate"), [], capsys)
    assert_explained(text, ["episodes", "steps", "seed", "split", "device", "threads"])


def test_defaults_are_those_of_the_task_and_the_method():
    assert default_options("glyphs", head="linear") == RunOptions()
    assert default_options("glyphs", "cg") == RunOptions()
    assert default_options("glyphs", "unrolled").proximal == 0.0
    assert default_options("sinusoid").method == "unrolled"
    assert default_options("sinusoid", "cg").inner_steps == 32
    assert default_options("sinusoid", "cg").method_options == {"solver_steps": 10}
    assert default_options("sinusoid", "nystrom").method_options == {}
    assert default_options("omniglot", "nystrom").proximal == 0.5
    assert default_options("omniglot", "unrolled").proximal == 0.0
    assert default_options("folder", "cg").queries == 15
    assert default_options("glyphs", "cg").test_steps == 16
    assert default_options("glyphs", "unrolled").test_steps == 4
    assert default_options("sinusoid").test_steps == 10
    assert default_options("sinusoid", "cg").test_steps == 64
    assert default_options("glyphs", inner_optimizer="newton-cg").inner_options == {"cg_steps": 3}


@pytest.mark.parametrize(
    ("args", "head", "adapt"),
    [
        ([], "ridge", "head"),
        (["--task=omniglot"], "ridge", "head"),
        (["--task=folder", "--filters=8"], "ridge", "head"),
        (["--method=cg"], "linear", "all"),
        (["--inner-optimizer=momentum"], "linear", "all"),
        (["--inner-steps=3"], "linear", "all"),
        (["--adapt=head"], "linear", "head"),
        (["--proximal=1"], "linear", "all"),
        (["--task=sinusoid"], "linear", "all"),
    ],
)
def test_the_head_is_ridge_unless_something_is_said_about_what_adapts_and_how(args, head, adapt):
    options = parse(args)
    assert (options.head, options.adapt) == (head, adapt)


@pytest.mark.parametrize("flag", ["--inner-steps", "--inner-lr"])
def test_a_head_that_is_solved_exactly_has_no_steps_to_choose(flag):
    with pytest.raises(ValueError, match=f"{flag}: got one with --inner-optimizer ridge"):
        parse(["--head=ridge", f"{flag}=1"])
    assert parse(["--head=ridge", "--inner-optimizer=lbfgs", f"{flag}=1"]).head == "ridge"


def test_a_run_without_limits_lasts_two_minutes():
    assert RunOptions().completed().minutes == 2.0
    assert RunOptions(steps=5).completed().minutes is None


def test_options_are_loaded_as_they_were_stored():
    options = RunOptions(out=Path("x"), learn=("lr",), method_options={"solver_steps": 7})
    stored = json.loads(json.dumps(options.dump()))
    assert RunOptions.load(stored) == options
    del stored["activation"]
    assert RunOptions.load(stored).activation == "relu"
    several = json.loads(json.dumps(RunOptions(filters=(1, 2, 3, 4)).dump()))
    assert RunOptions.load(several).filters == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="options: got colour, which this version does not know"):
        RunOptions.load({"colour": 1})


def test_an_option_that_came_later_is_no_part_of_the_identity_at_its_default():
    """Runs that were stored before it existed are resumed and evaluated."""
    before = RunOptions().identity()
    assert not ADDED & set(before)
    assert before["filters"] == 32
    assert RunOptions(network="mlp").identity() == before | {"network": "mlp"}
