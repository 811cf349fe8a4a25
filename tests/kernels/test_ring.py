"""How the CUDA kernel's warps hand tiles on, run in random order: loads that finish in any order, warpgroups at any speed.

A wait on a barrier in shared memory tells its phases apart by parity alone (PTX ISA, mbarrier.try_wait.parity).
"""

import random

import pytest

from mla_attention.tuning import hopper_config, hopper_groups


class Barrier:
    """`count` arrivals end a phase."""

    def __init__(self, count):
        self.count, self.arrived, self.phase = count, 0, 0

    def arrive(self):
        self.arrived += 1
        if self.arrived == self.count:
            self.arrived, self.phase = 0, self.phase + 1

    def passed(self, parity):
        return self.phase & 1 != parity


class WrongTileError(Exception):
    """A warpgroup was let into a stage that does not hold its tile."""


def walk(stages, groups, tiles, seed):
    """One random course of a program: a loading warp, loads under way, and warpgroups that take turns at tiles."""
    rng = random.Random(seed)
    full, empty = ([Barrier(1) for _ in range(stages)] for _ in range(2))
    held, under_way = [None] * stages, []
    loaded, at = 0, list(range(groups))
    while loaded < tiles or under_way or any(tile < tiles for tile in at):
        actor = rng.randrange(-2, groups)
        if actor == -2 and under_way:
            tile = under_way.pop(rng.randrange(len(under_way)))
            held[tile % stages] = tile
            full[tile % stages].arrive()
        elif actor == -1 and loaded < tiles and empty[loaded % stages].passed(loaded // stages & 1 ^ 1):
            held[loaded % stages] = None
            under_way.append(loaded)
            loaded += 1
        elif actor >= 0 and (tile := at[actor]) < tiles and full[tile % stages].passed(tile // stages & 1):
            if held[tile % stages] != tile:
                raise WrongTileError
            empty[tile % stages].arrive()
            at[actor] += groups


@pytest.mark.parametrize("seed", range(5))
def test_stages_of_their_own(seed):
    sizes = {
        (hopper_config(rank, rope).stages, hopper_groups(rank)) for rank in range(16, 257, 16) for rope in (0, 64, 128)
    }
    for stages, groups in sizes:
        walk(stages, groups, 400, seed)


@pytest.mark.parametrize(("stages", "groups"), [(7, 3), (5, 2)])
def test_shared_stages_go_wrong(stages, groups):
    """What stopped ranks up to 160 on a card: a warpgroup a ring ahead is let in while the tile before is on its way."""
    with pytest.raises(WrongTileError):
        for seed in range(200):
            walk(stages, groups, 400, seed)
