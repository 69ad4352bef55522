"""The progress line: often on a terminal, now and then in a log, and nothing where none is wanted."""

import sys
import time

import pytest

from patchflow.progress import progress_line


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (False, True), (True, False)])
def test_a_log_is_not_filled(terminal, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress_line(total=8, title="walk", shown=shown) as bar:
        for _ in range(8):
            time.sleep(0.15)
            bar.update()
    lines = [line for line in capsys.readouterr().err.split("\r") if line.strip()]
    if not shown:
        assert not lines
    elif terminal:
        assert len(lines) > 4
    else:
        assert len(lines) <= 2
        assert "8/8" in lines[-1]


def test_it_goes_through_what_it_is_given(capsys):
    assert list(progress_line([3, 1, 2], unit="image")) == [3, 1, 2]
    assert "3/3" in capsys.readouterr().err
