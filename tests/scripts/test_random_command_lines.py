"""Random command lines are parsed, or refused in one line."""

import json

from command_line import RunOptions
from scripts.random_command_lines import check_lines


def test_random_command_lines_are_parsed_or_refused_in_one_line(tmp_path):
    config = {"options": RunOptions(task="sinusoid").dump()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ends = check_lines(seed=0, count=30, run=tmp_path)
    assert ends["trace"] == 0
    assert min(ends["line"], ends["runs"]) > 5
