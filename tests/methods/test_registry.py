"""`METHODS`: what its flags and options mean."""

from dataclasses import FrozenInstanceError

import pytest

from metaimplicit import METHODS, Implicit, Nystrom
from metaimplicit.inner import INNER_LOOPS, make_inner
from metaimplicit.methods import known_options, make_method, methods_with, with_options


@pytest.mark.parametrize("flag", METHODS)
def test_a_flag_means_the_row_of_the_table(flag):
    assert make_method(flag) is METHODS[flag]


@pytest.mark.parametrize("name", [*METHODS, *INNER_LOOPS])
def test_a_row_is_a_value_that_nothing_can_change(name):
    """Whoever takes it out of the table has the one that all others have."""
    row = METHODS[name] if name in METHODS else make_inner(name)
    with pytest.raises(FrozenInstanceError):
        row.steps = None


def test_four_methods_take_first_derivatives_alone():
    first = {name for name, method in METHODS.items() if not method.second_derivatives}
    assert first == {"first-order", "reptile", "sama", "f2sa"}


def test_an_option_changes_the_solver():
    assert make_method("nystrom", rank=20) == Implicit(Nystrom(rank=20))


def test_an_option_that_other_methods_have_is_refused_with_their_flags():
    assert {"nystrom", "nystrom-gaussian", "nystrom-cg"} <= set(methods_with("rank"))
    having = ", ".join(methods_with("rank"))
    with pytest.raises(ValueError, match=rf"method 'cg': got option 'rank', .* have it: {having}$"):
        make_method("cg", rank=20)


def test_an_option_that_no_method_has_is_refused():
    with pytest.raises(ValueError, match=r"method 'cg': got option 'colour', .* no method has it"):
        make_method("cg", colour=20)


def test_an_option_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"Richardson scale: got 0\.0, expected a number > 0"):
        make_method("t1-t2", scale=0.0)


def test_known_options_drops_those_that_the_method_does_not_have_and_those_that_are_none():
    assert known_options("nystrom", rank=4, solver_steps=2, rho=None) == {"rank": 4}


def test_options_are_set_together_and_then_checked():
    """One of these two alone would be refused."""
    method = Implicit(curvature="gauss-newton")
    changed = with_options(method, {"products": "finite-differences", "curvature": "hessian"})
    assert (changed.products, changed.curvature) == ("finite-differences", "hessian")
