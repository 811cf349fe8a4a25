"""A model of the CUDA kernel's ring of tiles, in random order: loads finish in any order, warpgroups have any speed.

A wait on a barrier in shared memory distinguishes its phases by parity alone (PTX ISA, mbarrier.try_wait.parity).
"""

import random

import pytest

from mla_attention.tuning import hopper_config, hopper_groups


class Barrier:
    """A barrier whose phase ends after `count` arrivals."""

    def __init__(self, count):
        self.count, self.arrived, self.phase = count, 0, 0

    def arrive(self):
        self.arrived += 1
        if self.arrived == self.count:
            self.arrived, self.phase = 0, self.phase + 1

    def passed(self, parity):
        return self.phase & 1 != parity


class WrongTileError(Exception):
    """A warpgroup has entered a stage that does not hold its tile."""


def walk(stages, groups, tiles, seed):
    """Run a program in random order: a loading warp, loads in flight, and warpgroups that take turns at tiles."""
    rng = random.Random(seed)
    full, empty = ([Barrier(1) for _ in range(stages)] for _ in range(2))
    held, in_flight = [None] * stages, []
    loaded, at = 0, list(range(groups))
    while loaded < tiles or in_flight or any(tile < tiles for tile in at):
        actor = rng.randrange(-2, groups)
        if actor == -2 and in_flight:
            tile = in_flight.pop(rng.randrange(len(in_flight)))
            held[tile % stages] = tile
            full[tile % stages].arrive()
        elif actor == -1 and loaded < tiles and empty[loaded % stages].passed(loaded // stages & 1 ^ 1):
            held[loaded % stages] = None
            in_flight.append(loaded)
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
    """A warpgroup that is a ring ahead enters a stage while its earlier tile is still loading; ranks up to 160 hung so."""
    with pytest.raises(WrongTileError):
        for seed in range(200):
            walk(stages, groups, 400, seed)
