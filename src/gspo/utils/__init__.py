"""ART's helpers for loops: `iterate_dataset`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from gspo.absent import refusing
from gspo.core.errors import DataError, check_whole

__all__ = ["DatasetBatch", "iterate_dataset"]

Item = TypeVar("Item")


class DatasetBatch(NamedTuple, Generic[Item]):
    """The items of one training step.

    Attributes:
        items: of the dataset.
        step: from 0, over all epochs: what `initial_step` counts.
        epoch: from 0.
        epoch_step: from 0 in each epoch.
    """

    items: list[Item]
    step: int
    epoch: int
    epoch_step: int


@refusing
def iterate_dataset(
    dataset: Sequence[Item], groups_per_step: int = 1, num_epochs: int = 1, initial_step: int = 0
) -> Iterator[DatasetBatch[Item]]:
    """The dataset in batches, in another order each epoch, the same in each process.

    >>> [batch.items for batch in iterate_dataset("abc", groups_per_step=2)]
    [['b', 'c'], ['a']]

    Args:
        dataset: anything with a length and numbered items.
        groups_per_step: items of one batch; the last one of an epoch may have fewer.
        num_epochs: passes over the dataset.
        initial_step: steps that are done, such as `await model.get_step()`: they are left out.

    Raises:
        ConfigError: an unknown argument, or a number out of range.
        DataError: the dataset is empty.
    """
    check_whole("groups_per_step", groups_per_step, 1)
    check_whole("num_epochs", num_epochs, 0)
    check_whole("initial_step", initial_step, 0)
    if not len(dataset):
        raise DataError("iterate_dataset got an empty dataset: give at least one item")
    return _batches(dataset, groups_per_step, num_epochs, initial_step)


def _batches(
    dataset: Sequence[Item], size: int, epochs: int, first: int
) -> Iterator[DatasetBatch[Item]]:
    steps = -(-len(dataset) // size)
    for epoch in range(first // steps, epochs):
        order = random.Random(epoch).sample(range(len(dataset)), len(dataset))
        for i in range(steps):
            step = epoch * steps + i
            if step >= first:
                items = [dataset[number] for number in order[i * size : (i + 1) * size]]
                yield DatasetBatch(items, step, epoch, i)
