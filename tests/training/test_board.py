"""TensorBoard reads what a run writes."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metaimplicit.training.board import Board


def test_scalars_are_read_by_tensorboard_and_a_resumed_run_purges_what_it_repeats(tmp_path):
    first = Board(tmp_path, purge_step=1)
    for step in range(1, 5):
        first.add_scalars({"train/loss": 1 / step, "train/accuracy": 0.5}, step=step)
    first.close()
    resumed = Board(tmp_path, purge_step=3)
    resumed.add_scalars({"train/loss": 7.0}, step=3)
    resumed.close()

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/accuracy", "train/loss"]
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert [event.step for event in events.Scalars("train/accuracy")] == [1, 2]
