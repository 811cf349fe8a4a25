"""The process that starts several others takes the exit code of the one that failed, and says so once if it was killed."""

import signal

import pytest

from mla_convert.cli import launch
from mla_convert.core.errors import ResourceError, UsageError


class Fake:
    """A process whose exit code is seen after some looks."""

    def __init__(self, code, looks=0):
        self.code, self.looks = code, looks

    def poll(self):
        self.looks -= 1
        return None if self.looks >= 0 else self.code


@pytest.mark.parametrize(
    "processes, code",
    [
        ([Fake(0), Fake(0, 3)], 0),
        ([Fake(4), Fake(0, 99)], 4),
        ([Fake(0, 99), Fake(2, 2)], 2),
        ([Fake(launch.LOST), Fake(4, 3)], 4),  # the first one noticed that the other ended
        ([Fake(launch.LOST), Fake(5)], 5),
    ],
)
def test_the_code_is_that_of_the_process_that_failed(processes, code, monkeypatch):
    monkeypatch.setattr(launch, "POLL", 0)
    assert launch._wait(processes) == code


@pytest.mark.parametrize("first", [Fake(launch.LOST), Fake(None, 10**9), Fake(0)])
def test_a_killed_process_is_named(first, monkeypatch):
    monkeypatch.setattr(launch, "POLL", 0)
    with pytest.raises(ResourceError, match=r"process 2 of 2 was killed \(SIGKILL\)"):
        launch._wait([first, Fake(-signal.SIGKILL, 2)])


def test_processes_that_lost_each_other_end(monkeypatch):
    monkeypatch.setattr(launch, "POLL", 0)
    monkeypatch.setattr(launch, "GRACE", 0.01)
    for other in (Fake(launch.LOST), Fake(None, 10**9)):
        with pytest.raises(ResourceError, match="lost each other"):
            launch._wait([Fake(launch.LOST), other])


def test_who_starts_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [launch.check_count(gpus) for gpus in (None, 1, 2)] == [False, False, True]
    assert not launch.launched() and not launch.follows()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launch.follows() and not launch.check_count(2)
    with pytest.raises(UsageError, match="--gpus 3 in 2 processes"):
        launch.check_count(3)
