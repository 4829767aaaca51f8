from __future__ import annotations

import pytest

from gspo.backend import ranks
from gspo.backend.ranks import Ranks, _check_shared
from gspo.core.errors import ConfigError, RunError


class OneRank:
    """A mesh of one, or of two of which the other doesn't see the folder."""

    rank, hosts, broken = 0, ("a", "b"), ""

    def __init__(self, seen=(True,)):
        self.seen, self.closed = seen, False

    def share(self, value):
        return value

    def gather(self, value):
        return list(self.seen)

    def together(self, work):
        return work()

    def close(self):
        self.closed = True


def test_the_mesh_is_each_ranks_own_and_results_come_back():
    mesh = OneRank()
    first = Ranks(mesh)  # pyright: ignore[reportArgumentType]
    assert first.call(lambda own, other: (own is mesh, other), mesh, 3) == (True, 3)
    first.close()
    assert mesh.closed


@pytest.mark.parametrize("fault", ["", "the first rank has ended"])
def test_a_rank_that_follows_leaves_by_its_status_alone(fault, monkeypatch, capsys):
    """What surrounds it in a script sees no exception: `gspo train` would call it an error."""
    mesh = OneRank()

    def leave(status):
        raise KeyboardInterrupt(status)

    def await_work():
        mesh.broken = fault
        if fault:
            raise RunError(fault)

    monkeypatch.setattr(mesh, "await_work", await_work, raising=False)
    monkeypatch.setattr(mesh, "share", lambda _: (ranks._end, []))
    monkeypatch.setattr(ranks, "leave", leave)
    with pytest.raises(KeyboardInterrupt, match=str(int(bool(fault)))):
        ranks.follow(mesh)  # pyright: ignore[reportArgumentType]
    assert fault in capsys.readouterr().err


def test_a_folder_that_a_rank_cannot_see_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rank 1 \(b\) can't see"):
        _check_shared(OneRank((True, False)), tmp_path)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())
