"""Few or made-up images in the place of data sets, and nothing drawn that no test looks at."""

import pytest
import torch
from scripts.running import draw_nothing

import tasks
from tasks import glyphs


@pytest.fixture(scope="module", autouse=True)
def _few_glyphs(tmp_path_factory):
    """The 160 first characters have classes enough. To render all of them takes seconds."""
    shared_characters = glyphs.shared_characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "shared_characters", lambda faces: shared_characters(faces)[:160])
        # Elsewhere in the tests, the cache holds all of them.
        patch.setenv(
            "METAIMPLICIT_CACHE", str(tmp_path_factory.getbasetemp().parent / "few-glyphs")
        )
        yield


@pytest.fixture(autouse=True)
def _empty_drawings(request, monkeypatch):
    """Drawings and pages take time, so there are none but for tests marked as looking at them."""
    if request.node.get_closest_marker("drawn") is None:
        pages = request.node.get_closest_marker("pages") is not None
        draw_nothing(monkeypatch, pages=pages)


@pytest.fixture
def noise_cifar10(monkeypatch):
    """Noise in CIFAR-10's place: 20 training and 11 test images of each class."""
    generator = torch.Generator().manual_seed(0)

    def draw(images):
        shape = (10 * images, 3, 32, 32)
        inputs = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return tasks.Examples(inputs, torch.arange(10).repeat(images))

    sets = (draw(20), draw(11))
    monkeypatch.setattr(tasks, "cifar10", lambda data_root=None: sets)


@pytest.fixture
def blob_mnist(monkeypatch):
    """Ten noisy blobs in MNIST's place: 40 training and 11 test images of each class."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 200, (10, 1, 28, 28), generator=generator)

    def draw(images):
        targets = torch.arange(10).repeat(images)
        noise = torch.randint(0, 56, (10 * images, 1, 28, 28), generator=generator)
        return tasks.Examples((prototypes[targets] + noise).to(torch.uint8), targets)

    sets = (draw(40), draw(11))
    monkeypatch.setattr(tasks, "mnist", lambda data_root=None: sets)


@pytest.fixture(autouse=True)
def _outside_of_the_checkout(tmp_path_factory, monkeypatch):
    """Runs that somebody has trained there, in runs/, are no matter."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
