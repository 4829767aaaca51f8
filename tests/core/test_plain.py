"""What users put into metrics and metadata becomes Python's own, or is refused by its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gspo.core.errors import DataError
from gspo.core.plain import plain_number, plain_values


@pytest.mark.parametrize(
    ("given", "plain"),
    [(np.float32(0.5), 0.5), (torch.tensor(3), 3), (np.bool_(True), True), (True, True), (2, 2)],
)
def test_scalars_of_other_libraries_become_pythons_own(given: Any, plain: Any):
    assert plain_number(given) == plain and type(plain_number(given)) is type(plain)


@pytest.mark.parametrize("given", ["1", None, torch.zeros(2), 10**400, 1j, [1.0]])
def test_what_is_no_number_is_none(given: Any):
    assert plain_number(given) is None


def test_a_dict_is_refused_by_the_place_that_is_wrong():
    assert plain_values({"a": np.float64(1)}, "metrics") == {"a": 1.0}
    assert plain_values({"a": None, "b": "x"}, "metadata", texts=True) == {"a": None, "b": "x"}
    wrong = (([], "m is .*must be a dict"), ({1: 1}, "m has the key 1"), ({"a": "x"}, r"m\['a'\]"))
    for given, message in wrong:
        with pytest.raises(DataError, match=message):
            plain_values(given, "m")
