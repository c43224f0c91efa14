"""Recipes: named options for the rows of the few-shot tables."""

import json

import pytest
from command_line import parse, recipes
from command_line.recipes import RECIPES, Recipe
from scripts.running import error_line, load_main

train = load_main("train")


@pytest.fixture
def tiny(monkeypatch):
    settings = {"filters": 4, "steps": 2, "meta_batch": 2, "vectorize": "vmap"}
    settings |= {"validation_episodes": 4, "test_episodes": 4}
    recipe = Recipe("glyphs", {"MAML": "98.7"}, head="ridge", settings=settings)
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_options_in_range_for_the_row_that_its_name_says(name):
    options = parse(["--recipe", name])
    assert name.startswith(f"{options.task}-{options.ways}w{options.shots}s-")
    assert str(options.folder) == f"runs/{name}-0"
    assert options.test_episodes == 1000
    assert RECIPES[name].papers


def test_what_else_is_given_replaces_an_option_of_the_recipe():
    options = parse(["--recipe", "omniglot-5w1s-ridge", "--filters", "32", "--seed=3"])
    assert (options.filters, options.seed, options.train_ways) == (32, 3, 20)


def test_a_run_of_a_recipe_says_what_papers_have_and_is_resumed_by_its_name(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    train(["--recipe", "tiny"])
    assert capsys.readouterr().out.endswith("In papers: MAML 98.7 %\n")
    train(["--recipe", "tiny", "--resume", "--steps", "3"])
    summary = json.loads((tmp_path / "runs/tiny-0/summary.json").read_text())
    assert summary["meta_steps"] == 3


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--recipe=none"], "--recipe: got 'none', expected one of omniglot-5w1s-ridge"),
        (
            ["--recipe=omniglot-5w1s-ridge", "--head=logistic"],
            "--head: got logistic, but --recipe omniglot-5w1s-ridge has ridge; leave one out",
        ),
        (
            ["--recipe=omniglot-5w1s-ridge", "--task=glyphs"],
            "--task: got glyphs, but --recipe omniglot-5w1s-ridge has omniglot; leave one out",
        ),
    ],
)
def test_a_recipe_that_is_unknown_or_contradicted_is_one_line(args, line, capsys):
    assert line in error_line(train, args, capsys)
