"""Damage for inputs, drawn from a seed: bytes, JSON and what holds JSON; and a runner that survives whatever they do to us."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import select
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NESTED = "[" * 100_000
VALUES = [None, True, False, "", "x", "../x", "\x1b[31mred\n", "\ud800", "é" * 300, [], {}, [[]], [None], {"a": {}}, 0, -1, 1,
          3, 0.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 1e308, -1e308, math.nan, math.inf, -math.inf, "3", "1e9", [1, 2, 3], [-1],
          ["a", 7]]  # fmt: skip


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes with one kind of damage that storage and transport do."""
    place, end = draw.randrange(len(data)), draw.randrange(1, 64)
    kind = draw.randrange(8)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return data[:place]
    if kind == 3:
        return data[:place] + data[place + end :]
    if kind == 4:
        return data[:place] + data[place : place + end] + data[place:]
    if kind == 5:
        return data[:place] + draw.randbytes(end) + data[place:]
    if kind == 6:
        return data[:place] + bytes(end) + data[place + end :]
    return data[place:]


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of JSON content."""
    found, left = [], [content]
    while left:
        holder = left.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in list(keys)[:400]:
            found.append((holder, key))
            left.append(holder[key])
    return found


def mutated_json(text: str, draw: random.Random) -> bytes:
    """A JSON text with one entry changed, taken out, renamed or moved; sometimes its bytes damaged, or nested without end."""
    kind = draw.randrange(12)
    if kind == 0:
        return mutated_bytes(text.encode(), draw)
    content = json.loads(text)
    holder, key = draw.choice(_places(content))
    value = holder[key]
    if kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[draw.choice([key.upper(), key + "_", "x", "\x00", key[:-1]])] = holder.pop(key)
    elif kind == 3:
        other, place = draw.choice(_places(content))
        other[place] = json.loads(json.dumps(value))
    elif kind == 4:
        holder[key] = "@NESTED@"
        return json.dumps(content).replace('"@NESTED@"', NESTED).encode()
    elif kind <= 7 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = draw.choice(
            [value + 1, value - 1, value * 2, value // 2, -value, value * 1000, value * 10**9, float(value)]
        )
    elif kind == 8 and isinstance(value, str) and value:
        place = draw.randrange(len(value))
        holder[key] = value[:place] + chr(draw.choice([0, 10, 27, 65, 0xE9, 0x202E, 0x1F600])) + value[place + 1 :]
    else:
        holder[key] = draw.choice(VALUES)
    return json.dumps(content).encode()


def mutated_safetensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with its header, its length or any of its bytes changed."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = draw.randrange(4)
    if kind == 0:
        return (
            struct.pack("<Q", draw.choice([0, 1, length - 1, length + 1, 2**31, 2**63, draw.randrange(2**20)]))
            + data[8:]
        )
    if kind == 1:
        return mutated_bytes(data, draw)
    header = (
        mutated_json(data[8 : 8 + length].decode(), draw) if kind == 2 else mutated_bytes(data[8 : 8 + length], draw)
    )
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@dataclass(frozen=True)
class Case:
    """One mutated input: what it is called, how it is made (in a folder of its own), and the command that reads it.

    `judge` looks at an input that was taken (exit code 0) and says what is wrong with that, or None.
    """

    name: str
    make: Callable[[Path], list[str]]
    judge: Callable[[Path, str], str | None] = lambda folder, out: None


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def _run(case: Case, folder: Path, codes: tuple[int, ...]) -> str | None:
    """The fault in how the command takes a case, or None."""
    from mla_convert.cli.main import main

    arguments = case.make(folder)
    before = _listing(folder)
    streams = {number: folder.parent / f"stream{number}" for number in (1, 2)}
    for number, path in streams.items():  # what libraries of C and Rust print counts as well
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["mla-convert", *arguments]
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        code = "".join(traceback.format_exc())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    out, err = (streams[number].read_bytes() for number in (1, 2))
    return (
        _wrong(code, out, err, codes)
        or ("something was written" if _listing(folder) != before else None)
        or (case.judge(folder, out.decode(errors="replace")) if code == 0 else None)
    )


def _wrong(code: Any, out: bytes, err: bytes, codes: tuple[int, ...]) -> str | None:
    """The fault in an exit code and the two streams, or None."""
    shown = err.decode("utf-8", "replace").strip()[-300:]
    if code not in codes:
        return f"exit code {code}: {shown}"
    try:
        text = err.decode("utf-8")
    except UnicodeDecodeError:
        return f"not UTF-8 on stderr: {err[-200:]!r}"
    lines = [line for line in text.split("\n") if line]
    if code == 0:
        return f"stderr of a run that is done: {shown}" if lines else None
    if len(lines) != 1 or not lines[0].startswith("mla-convert: "):
        return f"{len(lines)} lines on stderr: {shown}"
    if any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in lines[0]) or len(lines[0]) > 1500:
        return f"an unclean line: {lines[0][:200]!r}"
    return None


def run_cases(
    cases: list[Case], codes: tuple[int, ...] = (0, 2, 4, 5), processes: int = 2, seconds: float = 20
) -> list[str]:
    """Run all cases, in forks of this process that has everything imported; what is wrong, a line each.

    A fork that says nothing for `seconds` is ended, and its case is a hang; another goes on with the next one.
    """
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        queues = {number: list(range(number, len(cases), processes)) for number in range(processes)}
        running = {}
        for number, queue in queues.items():
            if queue:
                running[number] = _start(cases, queue, codes, Path(place) / str(number))
        while running:
            for number in list(running):
                pid, pipe = running[number]
                if pipe.poll(seconds if len(running) == 1 else seconds / len(running)):
                    index, problem = pipe.receive()
                    if index is None:  # all done
                        os.waitpid(pid, 0)
                        running.pop(number)
                        continue
                else:
                    index, problem = queues[number][0], f"no answer in {seconds} s"
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    running[number] = _start(cases, queues[number][1:], codes, Path(place) / str(number))
                queues[number].remove(index)
                if problem:
                    wrong.append(f"{cases[index].name}: {problem}")
    return wrong


class _Pipe:
    """Lines of JSON from a fork."""

    def __init__(self, number: int):
        self._file = os.fdopen(number, "rb", buffering=0)
        self._rest = b""

    def poll(self, seconds: float) -> bool:
        return b"\n" in self._rest or bool(select.select([self._file], [], [], seconds)[0])

    def receive(self) -> tuple[int | None, str | None]:
        while b"\n" not in self._rest:
            part = self._file.read(1 << 16)
            if not part:
                return None, None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return tuple(json.loads(line))


def _start(cases: list[Case], queue: list[int], codes: tuple[int, ...], place: Path) -> tuple[int, _Pipe]:
    """A fork that runs cases and tells of each."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, _Pipe(reading)
    os.close(reading)
    try:
        import shutil

        from typer.main import get_command

        from mla_convert.cli import main as cli

        cli.app = get_command(cli.app)  # built once, and not for every case
        place.mkdir(parents=True, exist_ok=True)
        os.chdir(place)
        for index in queue:
            folder = place / "case"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                problem = _run(cases[index], folder, codes)
            except BaseException as error:
                problem = f"the test itself failed: {error!r} {traceback.format_exc()[-600:]}"
            os.write(writing, (json.dumps([index, problem]) + "\n").encode())
    finally:
        os._exit(0)
