"""metrics.jsonl: what a resumed run keeps, what it sets aside, and what it says about it."""

import pytest

from metaimplicit.training import DamagedFileError, Progress, read_metrics, write_sealed_json
from metaimplicit.training.log import RunLog

RUN = "a"


def open_log(out, progress, run=RUN):
    return RunLog(out, progress, run, total=None, bar=False)


@pytest.fixture
def out(tmp_path):
    """A run of five steps, validated at the third."""
    write_sealed_json(tmp_path / "config.json", {"run": RUN})
    progress = Progress()
    with open_log(tmp_path, progress) as log:
        for step in range(1, 6):
            progress.step = step
            log.write("train", progress, {"loss": 1 / step})
            if step == 3:
                log.write("validation", progress, {"loss": 0.5})
    assert progress.lines == 6
    return tmp_path


def lines_of(out, name="metrics.jsonl"):
    return (out / name).read_bytes().splitlines(keepends=True)


def write_lines(out, lines):
    (out / "metrics.jsonl").write_bytes(b"".join(lines))


def resume(out, lines):
    with open_log(out, Progress(lines=lines)):
        pass


def steps(out):
    return [line["step"] for line in read_metrics(out)]


def test_a_resumed_run_keeps_the_lines_of_its_checkpoint_and_sets_later_ones_aside(out):
    before = lines_of(out)
    resume(out, lines=4)
    assert lines_of(out) == before[:4]
    assert lines_of(out, "metrics.aside.jsonl") == before[4:]
    assert steps(out) == [1, 2, 3, 3]


def test_a_log_that_ends_with_its_checkpoint_is_not_written_again(out):
    inode = (out / "metrics.jsonl").stat().st_ino
    resume(out, lines=6)
    assert (out / "metrics.jsonl").stat().st_ino == inode
    assert not (out / "metrics.aside.jsonl").exists()


def test_a_torn_last_line_is_dropped(out):
    lines = lines_of(out)
    write_lines(out, [*lines[:5], lines[5][:20]])
    assert steps(out) == [1, 2, 3, 3, 4]
    resume(out, lines=5)
    assert lines_of(out) == lines[:5]
    assert not (out / "metrics.aside.jsonl").exists()


def test_a_damaged_line_is_set_aside_with_a_warning_and_the_others_stay(out):
    lines = lines_of(out)
    damaged = lines[1].replace(b'"loss": 0.5', b'"loss": 0.4')
    write_lines(out, [lines[0], damaged, *lines[2:]])
    with pytest.raises(DamagedFileError, match=r"lacks 1 lines \(2\) of 6, and has 1 that are dam"):
        read_metrics(out)
    assert [line["step"] for line in read_metrics(out, complete=False)] == [1, 3, 3, 4, 5]
    with pytest.warns(UserWarning, match=r"lacks 1 lines \(2\).*are in metrics.aside.jsonl now"):
        resume(out, lines=6)
    assert lines_of(out) == [lines[0], *lines[2:]]
    assert lines_of(out, "metrics.aside.jsonl") == [damaged]


def test_missing_lines_are_said(out):
    write_lines(out, lines_of(out)[:1])
    with pytest.warns(UserWarning, match=r"lacks 5 lines \(2, 3, 4, …\) of 6, and has 0 that are"):
        resume(out, lines=6)
    (out / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"lacks 6 lines \(1, 2, 3, …\) of 6, and has 0 that are"):
        resume(out, lines=6)


def test_the_lines_of_another_run_and_repeated_lines_are_set_aside(out, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with open_log(other, Progress(step=1), run="b") as log:
        log.write("train", Progress(step=1), {"loss": 9.0})
    lines = lines_of(out)
    write_lines(out, [*lines_of(other), *lines, lines[0]])
    with pytest.warns(UserWarning, match=r"lacks no line of 6, and has 2 that are damaged"):
        resume(out, lines=6)
    assert lines_of(out) == lines
    assert lines_of(out, "metrics.aside.jsonl") == [*lines_of(other), lines[0]]


def test_a_log_that_was_removed_is_noticed(out):
    with open_log(out, Progress(lines=6)) as log:
        (out / "metrics.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: the file was removed during"):
            log.write("train", Progress(step=6), {"loss": 0.1})
