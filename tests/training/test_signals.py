"""Signals wait for the end of a step, and then do what they would have done."""

import signal
import threading

import pytest
import torch
from training.sinusoid_run import assert_same_weights, make_parts, train
from training.test_tuner_run import assert_same_weights as assert_same_tuner
from training.test_tuner_run import fit, make_tuner, validation_loss

from metaimplicit.training import (
    STOP_SIGNALS,
    DeferredSignals,
    load_checkpoint,
    load_tuner,
    read_metrics,
)


class SignalledError(Exception):
    def __init__(self, number, frame):
        super().__init__(number)
        self.number = number


@pytest.fixture(autouse=True)
def _signals_raise():
    """As the scripts do, handle the signals by an exception."""

    def handle(number, frame):
        raise SignalledError(number, frame)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class SignallingSampler:
    """A sampler during whose batch of one number a signal arrives, or several."""

    def __init__(self, sampler, at, *numbers):
        self.sampler = sampler
        self.at = at
        self.numbers = numbers
        self.state_dict = sampler.state_dict
        self.load_state_dict = sampler.load_state_dict

    def batches(self, count, workers=0, pin_memory=False):
        for episodes in self.sampler.batches(count, workers, pin_memory):
            if self.sampler.position == self.at:
                for number in self.numbers:
                    signal.raise_signal(number)
            yield episodes


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_waits_for_the_end_of_the_block(number):
    received = []

    def run():
        with DeferredSignals() as signals:
            received.append(signals.received)
            signal.raise_signal(number)
            received.append(signals.received)

    with pytest.raises(SignalledError) as caught:
        run()
    assert received == [None, number]
    assert caught.value.number == number


def test_a_second_signal_does_not_wait():
    def run():
        with DeferredSignals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second signal waited")

    with pytest.raises(SignalledError) as caught:
        run()
    assert caught.value.number == signal.SIGINT


def test_handlers_are_restored_and_ignored_signals_stay_ignored():
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with DeferredSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
        assert signal.getsignal(signal.SIGTERM) != handler
    assert signal.getsignal(signal.SIGTERM) == handler
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_outside_the_main_thread_nothing_changes():
    handlers = []

    def enter():
        with DeferredSignals():
            handlers.extend(signal.getsignal(number) for number in STOP_SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]


def test_a_run_finishes_its_step_and_saves_it(tmp_path):
    learner, optimizer, sampler = make_parts()
    signalled = (learner, optimizer, SignallingSampler(sampler, 4, signal.SIGINT))
    with pytest.raises(SignalledError):
        train(tmp_path, signalled, steps=6)
    saved = make_parts()
    assert load_checkpoint(tmp_path / "checkpoint.pt", *saved).step == 4
    assert_same_weights(saved.learner, learner)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_signalled_run_that_is_resumed_ends_at_the_same_bits(tmp_path):
    unbroken = make_parts()

    def run(out, parts, **options):
        validation = [make_parts().sampler[99]]
        train(out, parts, steps=4, validation=lambda: validation, validate_every=2, **options)

    run(tmp_path / "unbroken", unbroken)
    out = tmp_path / "signalled"
    for step in (2, 3):
        learner, optimizer, sampler = make_parts()
        signalled = (learner, optimizer, SignallingSampler(sampler, step, signal.SIGTERM))
        with pytest.raises(SignalledError):
            run(out, signalled, resume=True)
        torch.manual_seed(step)
    resumed = make_parts()
    run(out, resumed, resume=True)
    assert_same_weights(resumed.learner, unbroken.learner)
    assert lines(out) == lines(tmp_path / "unbroken")


def test_a_signal_ends_a_validation_which_the_resumed_run_begins_with(tmp_path):
    batches = [make_parts().sampler[number] for number in (97, 98, 99)]
    seen = []

    def interrupted():
        for batch in batches:
            seen.append(batch)
            if len(seen) == 2:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    options = {"steps": 4, "validate_every": 2, "checkpoint_every": 3}
    unbroken = make_parts()
    train(tmp_path / "unbroken", unbroken, validation=lambda: batches, **options)

    broken = tmp_path / "broken"
    with pytest.raises(SignalledError):
        train(broken, make_parts(), validation=interrupted, **options)
    assert len(seen) == 2
    assert [line["split"] for line in read_metrics(broken)] == ["train", "train"]

    resumed = make_parts()
    train(broken, resumed, validation=lambda: batches, resume=True, **options)
    assert_same_weights(resumed.learner, unbroken.learner)
    assert lines(broken) == lines(tmp_path / "unbroken")


def test_a_second_signal_stops_a_run_in_its_step(tmp_path):
    learner, optimizer, sampler = make_parts()
    twice = SignallingSampler(sampler, 4, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(SignalledError):
        train(tmp_path, (learner, optimizer, twice), steps=6, checkpoint_every=2)
    assert load_checkpoint(tmp_path / "checkpoint.pt", *make_parts()).step == 2


def test_a_tuner_finishes_its_step_and_saves_it_and_resumes_to_the_same_bits(tmp_path):
    def raise_signal(step):
        signal.raise_signal(signal.SIGTERM)

    options = {"metric": validation_loss, "patience": 3}
    unbroken = make_tuner()
    fit(unbroken, tmp_path / "unbroken", **options)
    out = tmp_path / "signalled"
    for step in range(1, 4):
        with pytest.raises(SignalledError):
            fit(make_tuner(), out, callback=raise_signal, resume=True, **options)
        assert load_tuner(out / "checkpoint.pt", make_tuner()).step == step
    resumed = make_tuner()
    torch.manual_seed(7)
    fit(resumed, out, resume=True, **options)
    assert_same_tuner(resumed, unbroken)
    assert lines(out) == lines(tmp_path / "unbroken")


def lines(run):
    return [line | {"seconds": 0} for line in read_metrics(run)]


def test_a_signal_that_another_process_received_makes_the_own_one_no_second():
    steps = []

    def run():
        with DeferredSignals() as signals:
            signals.adopt(signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            signal.raise_signal(signal.SIGINT)
            steps.append("saved")
            signal.raise_signal(signal.SIGHUP)
            steps.append("never")

    with pytest.raises(SignalledError) as raised:
        run()
    assert raised.value.number == signal.SIGHUP  # at once
    assert steps == ["saved"]
