"""Tables as text that fits and has no trailing spaces."""

from __future__ import annotations

from gspo.lab.text_table import as_text, table


def test_numbers_stand_on_the_right_and_labels_where_asked():
    rows = [["a", "1"], ["long", "100"]]
    left = as_text([table(["", "n"], rows)], width=40).splitlines()
    assert left[-3:-1] == ["  a        1", "  long   100"]
    right = as_text([table(["", "n"], rows, labels="right")], width=40).splitlines()
    assert right[-3:-1] == ["     a     1", "  long   100"]


def test_only_tables_are_cut_to_the_width():
    line = "[no markup] " + "x" * 200
    text = as_text([line, table(["a"], [["y" * 100]])], width=50)
    assert text.splitlines()[0] == line
    assert all(len(cut) <= 50 and cut == cut.rstrip() for cut in text.splitlines()[1:])
