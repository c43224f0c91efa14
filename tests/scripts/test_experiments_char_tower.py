"""The character-level LSTM: its texts, its bits, and its state from window to window."""

import pytest
import torch
from experiments.char_lstm import CharLSTM, side_by_side
from experiments.char_tower import CharTower
from experiments.runner import execute


@pytest.fixture
def text(tmp_path):
    """A file of 2001 characters, the last of which needs two bytes."""
    path = tmp_path / "text.txt"
    characters = "".join(chr(97 + i * i % 23) for i in range(2000))
    path.write_text(f"{characters}é", encoding="utf-8")
    return path


def test_a_text_is_split_by_position(text):
    data = CharTower(text=text, streams=3, window=5, device="cpu").data()
    whole = text.read_text(encoding="utf-8")
    assert data.characters == "".join(sorted(set(whole)))
    # of 1800 and 201 characters
    assert data.training.shape == (3, 600)
    assert data.validation.shape == (3, 67)

    def decode(numbers):
        return "".join(data.characters[i] for i in numbers)

    streams = [decode(row) for row in data.training]
    assert streams == [whole[:600], whole[600:1200], whole[1200:1800]]
    assert decode(data.validation.flatten()) == whole[1800:]


def test_what_does_not_fill_the_streams_is_left_out():
    assert side_by_side(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_default_text_is_pythons_help():
    data = CharTower(device="cpu").data()
    assert data.training.numel() > 300_000
    assert data.training.shape[0] == data.validation.shape[0] == 32
    assert set("abcXYZ019 \n") <= set(data.characters)


def test_the_loss_is_the_cross_entropy_of_the_next_characters():
    model = CharLSTM(8, 3, 4, 2).double()
    text = torch.randint(8, (3, 21))
    loss, state = model.loss(text, 0, 6, state=None)
    outputs, _ = model.lstm(model.embedding(text[:, :6]))
    scores = model.scores(outputs).log_softmax(-1)
    following = [scores[stream, t, text[stream, t + 1]] for stream in range(3) for t in range(6)]
    torch.testing.assert_close(loss, -sum(following) / 18, rtol=1e-12, atol=0)
    assert not any(part.requires_grad for part in state)


@pytest.mark.parametrize("window", [1, 6, 50])
def test_the_bits_of_a_text_do_not_depend_on_the_window(window):
    model = CharLSTM(8, 3, 4, 2).double()
    text = torch.randint(8, (3, 21))
    assert model.bits(text, window) == pytest.approx(model.bits(text, 20), rel=1e-12)


def test_equal_scores_have_the_bits_of_the_number_of_characters():
    model = CharLSTM(8, 3, 4, 2).double()
    model.scores.weight.data.zero_()
    model.scores.bias.data.zero_()
    assert model.bits(torch.randint(8, (3, 21)), 4) == pytest.approx(3, rel=1e-12)


def test_the_state_is_carried_to_the_end_of_the_text_and_no_further(tmp_path, text, monkeypatch):
    plain_loss = CharLSTM.loss
    calls = []

    def noted_loss(self, text, first, size, *, state):
        calls.append((first, size, state is None))
        return plain_loss(self, text, first, size, state=state)

    monkeypatch.setattr(CharLSTM, "loss", noted_loss)
    experiment = CharTower(
        text=text,
        streams=3,
        window=250,
        hidden=2,
        embedding=2,
        epochs=2,
        device="cpu",
    )
    row = experiment.run({"method": "plain", "lr": 0.1, "seed": 0}, tmp_path)
    epoch = [(0, 250, True), (250, 250, False)]
    validation = [(0, 66, True)]
    assert calls == [*epoch, *epoch, *validation]
    assert row["perplexity"] == pytest.approx(2 ** row["bits"])


def test_a_perplexity_beyond_the_largest_float_is_a_diverged_run(tmp_path, text, monkeypatch):
    monkeypatch.setattr(CharLSTM, "bits", lambda self, text, window: 1025.0)
    experiment = CharTower(text=text, streams=3, window=250, hidden=2, embedding=2, device="cpu")
    row = experiment.run({"method": "plain", "lr": 0.1, "seed": 0}, tmp_path)
    assert row["reason"] == "the validation perplexity is not finite"
    assert row["diverged"] == 20  # ten epochs of two windows
    assert row["bits"] is None
    assert row["perplexity"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "--hidden: got 0, expected from 1 to 65536"),
        ({"start": (0.0,)}, "--start: got lr 0.0, expected a positive number"),
    ],
)
def test_an_option_out_of_range_is_refused_before_any_run(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        execute(CharTower(out=tmp_path / "out", device="cpu", **options))
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_used_is_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a" * 200)
    with pytest.raises(ValueError, match="--text: got 200 characters, expected about 2312 or more"):
        CharTower(text=short).check_options()
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1") * 9000)
    with pytest.raises(ValueError, match=r"--text: .*latin.txt: got bytes that are not UTF-8"):
        CharTower(text=latin).check_options()
    with pytest.raises(FileNotFoundError, match=r"--text: found no file .*none.txt"):
        CharTower(text=tmp_path / "none.txt").check_options()
