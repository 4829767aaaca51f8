"""Trees of options: dotted keys there and back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.core.trees import flat, put

KEYS = st.text("abc", min_size=1, max_size=2)
TREES = st.dictionaries(KEYS, st.recursive(st.integers(), lambda s: st.dictionaries(KEYS, s)))


@settings(max_examples=15, deadline=None)
@given(TREES)
def test_a_tree_is_made_again_from_its_dotted_keys(tree: dict):
    made: dict = {}
    for key, value in flat(tree).items():
        made = put(made, key.split("."), value)
    assert made == tree


def test_what_is_no_table_is_replaced_by_one():
    tree = {"a": 1}
    assert put(tree, ["a", "b"], 2) == {"a": {"b": 2}}
    assert tree == {"a": 1}
