"""Progress on stderr: with tqdm, without it, and not at all."""

import sys

from ternc import progress


def taken(**options):
    return list(progress.track(range(4), 4, "work", **options))


def test_items_pass_through_unchanged(capsys):
    assert taken() == taken(enabled=False) == taken(enabled=True) == [0, 1, 2, 3]
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("work") >= 1


def test_nothing_is_shown_off_a_terminal(capsys):
    taken()
    assert capsys.readouterr().err == ""


def test_lines_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert taken(enabled=True) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"work: {i} of 4" for i in (1, 2, 3, 4)]
    assert [line.endswith("s left") for line in lines] == [True, True, True, False]


def test_quick_work_gives_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(progress, "INTERVAL", 1e9)
    taken(enabled=True)
    assert capsys.readouterr().err == "work: 4 of 4, 0 s\n"
