"""Tables as text that fits and has no trailing spaces."""

from __future__ import annotations

from gspo.core.tables import as_text, table


def test_numbers_stand_on_the_right_and_words_on_the_left():
    rows = [["", "n", "range"], ["a", "1", "0.1/0.2"], ["long", "-100", "-"]]
    lines = as_text([table(rows)], width=40).splitlines()
    assert lines[-3:-1] == ["  a         1   0.1/0.2", "  long   -100         -"]


def test_a_narrow_terminal_breaks_no_value_inside_a_word():
    rows = [["a_long_header", "verdict"], ["0.00012345", "no difference shown"]]
    text = as_text([table(rows)], width=28)
    assert all(word in text for word in ("0.00012345", "difference", "shown"))
    assert all(len(line) <= 28 for line in text.splitlines())


def test_only_tables_are_cut_to_the_width():
    line = "[no markup] " + "x" * 200
    text = as_text([line, table([["a"], ["y " * 100]])], width=50)
    assert text.splitlines()[0] == line
    assert all(len(cut) <= 50 and cut == cut.rstrip() for cut in text.splitlines()[1:])


def test_a_plain_table_is_narrow_and_keeps_numbers_whole():
    rows = [["run", "changed"], ["a-long-name-" * 4, "2026-11-27 14:03"], ["b", "12"]]
    lines = as_text([table(rows, plain=True)], width=30).splitlines()
    assert lines[0].split() == ["run", "changed"] and lines[-1].split() == ["b", "12"]
    assert any(line.endswith("2026-11-27 14:03") for line in lines)
    assert all(len(line) <= 30 for line in lines)
