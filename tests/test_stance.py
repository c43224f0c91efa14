"""How compiled functions run in blocks of several threads."""

import threading
from contextlib import contextmanager

import pytest
import torch

from metaimplicit import stance
from metaimplicit.stance import compiled_functions


@pytest.fixture
def counted():
    """A compiled function of a number, and the list of what was compiled."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return torch.compile(lambda x, k: x * k, backend=backend, dynamic=False), graphs


@contextmanager
def in_another_thread(way):
    """A block that another thread is in from here on, until it is told to leave."""
    inside, leave = threading.Event(), threading.Event()

    def run():
        with compiled_functions(way):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(10)

    def end():
        leave.set()
        thread.join()

    try:
        yield end
    finally:
        end()


def test_functions_run_uncompiled_in_one_thread_alone(counted):
    function, graphs = counted
    with compiled_functions("uncompiled"):
        assert function(torch.ones(1), 2) == 2
    assert not graphs
    context = in_another_thread("uncompiled")
    end = context.__enter__()
    assert function(torch.ones(1), 2) == 2
    assert len(graphs) == 1
    end()


@pytest.fixture
def early_torch(monkeypatch):
    """A version of torch that cannot tell threads apart."""
    monkeypatch.setattr(stance, "_uncompiled", lambda: stance._stance.block("uncompiled"))


@pytest.mark.usefixtures("early_torch")
def test_functions_run_uncompiled_until_the_last_thread_leaves(counted):
    function, graphs = counted
    with compiled_functions("uncompiled"):
        context = in_another_thread("uncompiled")
        end = context.__enter__()
    assert function(torch.ones(1), 2) == 2
    assert not graphs
    end()
    assert function(torch.ones(1), 2) == 2
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("own", "other"),
    [("unguarded", "uncompiled"), ("uncompiled", "unguarded"), ("unguarded", "unguarded")],
)
@pytest.mark.usefixtures("early_torch")
def test_guards_are_back_after_blocks_that_end_in_the_order_of_their_beginning(counted, own, other):
    function, _ = counted
    function(torch.ones(1), 2)
    with compiled_functions(own):
        context = in_another_thread(other)
        end = context.__enter__()
    end()
    assert function(torch.ones(1), 3) == 3


@pytest.mark.usefixtures("early_torch")
def test_a_stance_of_the_user_is_put_back(counted):
    function, graphs = counted
    with torch.compiler.set_stance("force_eager"):
        with compiled_functions("unguarded"), compiled_functions("uncompiled"):
            pass
        function(torch.ones(1), 2)
    assert not graphs
