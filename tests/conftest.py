"""Every test starts from the same random state. Workers side by side have a thread each."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would take others' time

# The process that starts the workers runs no test. If it imported torch, they would wait for it.
if "PYTEST_XDIST_WORKER" in os.environ:
    gc.disable()  # until all tests are collected
    import torch

    torch.set_num_threads(1)


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what `nohup` starts ignores this


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--inductor` compiles as users do. It builds code, which takes two minutes."""
    parser.addoption("--inductor", action="store_true", help="run the tests that build code")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep the data that they read in a folder of all workers, not in the user's cache."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAIMPLICIT_CACHE", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def _seeds_of_devices_that_exist() -> Iterator[None]:
    """For a device that may come, torch keeps a stack trace of every seed, which takes time."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cuda", "xpu", "mtia"):
            device = getattr(torch, name)
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Set the random state of a test, and whether vmap is compared with a loop in it.

    Fixtures of every test would do the same, and take longer.
    """
    import torch

    torch.manual_seed(0)
    item.config.stash[IS_COMPARED] = _is_compared(item)


@pytest.fixture(scope="session", autouse=True)
def real_clock() -> Iterator[Callable[..., float]]:
    """The clock of `vectorize="auto"`. Without it, vmap is taken, whatever the machine is like."""
    from metaimplicit.learner import vectorization

    def prefer_vmap(run: Callable[[str], object], vectorize: str) -> float:
        return float(vectorize == "loop")

    clock = vectorization._shortest_time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectorization, "_shortest_time", prefer_vmap)
        yield clock


# Folders and files whose models are those that people have, or are made to make vmap fail.
COMPARED = {"fuzz", "mended", "reported", "vectorization", "zoo", "test_docstrings", "test_readme"}
IS_COMPARED = pytest.StashKey[bool]()  # of the test that runs


def _is_compared(item: pytest.Item) -> bool:
    places = {item.path.parent.name, item.path.stem}
    return bool(places & COMPARED) or item.get_closest_marker("compared") is not None


@pytest.fixture(scope="session", autouse=True)
def _vmap_is_trusted(pytestconfig: pytest.Config) -> Iterator[None]:
    """Vmap is compared with a loop in some tests only, since that takes a tenth of the time."""
    from metaimplicit.vectorization import choice

    find_objection = choice.find_objection

    def find_in_some_tests(*problem: Any) -> Any:
        return find_objection(*problem) if pytestconfig.stash[IS_COMPARED] else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "find_objection", find_in_some_tests)
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are of type float64, so that tolerances can be near round-off."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


SLOW_FOLDERS = {"scripts", "fuzz", "mended", "vectorization", "zoo"}
SLOW_FILES = {
    *("test_argmin", "test_argmin_orders", "test_auxiliary_losses", "test_compile", "test_forward"),
    *("test_stationarity", "test_fixed_point", "test_inner_decay", "test_learnable", "test_modes"),
    *("test_targets", "test_losses", "test_forms", "test_loss_forms"),
    *("test_check", "test_compare", "test_hidden_waits", "test_microbatches", "test_features"),
    *("test_data_gradients", "test_convex_heads", "test_heads"),
    *("test_gradients", "test_gradient_check", "test_features_once", "test_edges"),
    *("test_vectorization", "test_loop", "test_hoag", "test_batch_forms", "test_compare_script"),
    *("test_single_loop", "test_replay", "test_continued_loops", "test_newton_cg", "test_settings"),
    *("test_likelihoods", "test_kronecker", "test_cifar", "test_omniglot", "test_published"),
    *("test_learner_features", "test_readme", "test_precision"),
    *("test_attention", "test_report", "test_run_folder", "test_tuner_run", "test_default_device"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole programs and long tables are slow, one and all.

    Tests that start processes come first, so that one worker has them, and imports for them once.
    """
    items.sort(key=lambda item: not _starts_processes(item))
    for item in items:
        if item.path.parent.name in SLOW_FOLDERS or item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


def _starts_processes(item: pytest.Item) -> bool:
    """Whether the file of a test uses `rank_group`."""
    names = vars(item.module) if isinstance(item, pytest.Function) else {}
    return "run_on_ranks" in names or "forked_context" in names


def pytest_collection_finish() -> None:
    """The garbage collector need not look at torch and 7,000 tests again and again."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Pytest collects garbage five times at its end. It need not look at what the tests left."""
    gc.freeze()
