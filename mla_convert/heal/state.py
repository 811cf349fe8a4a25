"""What a healing run keeps on disk so that it can go on after it died: beside the output, gone when that is whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mla_convert.core.errors import ResourceError
from mla_convert.core.files import on_disk, remove, write_file
from mla_convert.heal.teacher_student import checkpoint_name

IDENTITY, RUN, BEST, TRAINER = "identity.json", "run.json", "best.safetensors", "trainer"
CHECKPOINT = "checkpoint"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def state_folder(out: Path) -> Path:
    """Where the state of the run that writes `out` lies."""
    return out.parent / f".{out.name}.heal"


def trained_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """What is trained, on the CPU, by its name in the checkpoint; adapters as NAME.lora_A.weight and NAME.lora_B.weight.

    Every process must call this; only the main one is sure to get everything.
    """
    inner = accelerator.unwrap_model(model)
    wanted = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
    full = (
        accelerator.get_state_dict(model) if accelerator.distributed_type in SHARDED else dict(inner.named_parameters())
    )
    found = {name.removeprefix("module."): tensor for name, tensor in full.items()}
    return {
        checkpoint_name(name).replace(".default.", "."): found[name].detach().float().cpu().clone()
        for name in sorted(wanted & found.keys())
    }


def _differing(before: Any, now: dict[str, Any]) -> str:
    """What of an identity is not as it was, in words."""
    words = {"original": "the original", "converted": "the converted model", "text": "the text to train on",
             "settings": "a setting", "engine": "the device or the number of processes", "versions": "a library"}  # fmt: skip
    found = [words.get(key, key) for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
    return " and ".join(found) or "the identity"


class StateFolder:
    """The folder of one run's state. `identity` is whatever makes an older state useless when it changed."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        accelerator: Accelerator,
        note: Callable[[str], None] = lambda words: None,
    ):
        """Raises:
        ResourceError: another run works there, or the disk does not suffice.
        """
        self._note = note
        self.folder, self._accelerator, self._removed = folder, accelerator, False
        self._identity = json.loads(json.dumps(identity, sort_keys=True, default=str))
        self._lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        if accelerator.is_main_process:
            self._made = [path for path in folder.absolute().parents if not path.exists()]
            try:
                with on_disk("the state of the run", folder.parent):
                    self._open()
            except BaseException:
                if self._lock.is_locked:
                    self._stop()
                    if self.last() is None:
                        self.remove()
                raise
        accelerator.wait_for_everyone()

    def _open(self) -> None:
        folder = self.folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResourceError(
                f"another run is healing into {folder.parent}: wait for it, or choose another --out"
            ) from None
        before = self._read(folder / IDENTITY)
        if before != self._identity:
            self._recover()
            if self.last() is not None:
                self._note(
                    f"starting anew: {_differing(before, self._identity)} changed since the checkpoint of an earlier run"
                )
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_file(folder / IDENTITY, json.dumps(self._identity))
        self._recover()

    def _stop(self) -> None:
        with contextlib.suppress(OSError):
            self._lock.release()
        remove(Path(self._lock.lock_file))

    def __enter__(self) -> StateFolder:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._accelerator.is_main_process:
            self._stop()
        # a run that stopped goes on from its last checkpoint; without one there is nothing to keep
        if error is None or self._removed:
            return
        last = self.last()
        if last is None:
            self.remove()
        elif isinstance(error, KeyboardInterrupt):
            error.args = (f"a checkpoint after {last['step']} steps is in {self.folder}: run the same command to go on, "
                          f"or delete it",)  # fmt: skip

    @staticmethod
    def _read(file: Path) -> Any:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def remember(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returns (JSON), made by the main process once for all processes and for runs that go on."""
        file = self.folder / name
        if self._accelerator.is_main_process and self._read(file) is None:
            content = json.dumps(make())
            with on_disk("the state of the run", self.folder.parent):
                write_file(file, content)
        self._accelerator.wait_for_everyone()
        return self._read(file)

    def last(self) -> dict[str, Any] | None:
        """What `save` was given when the last whole checkpoint was written; None where there is none."""
        return self._read(self.folder / CHECKPOINT / RUN)

    def save(self, run: dict[str, Any], best: dict[str, Tensor] | None) -> None:
        """Write a checkpoint beside the last one, then put it in that one's place. Every process must call this.

        Raises:
            ResourceError: the disk does not suffice; the last checkpoint stays.
        """
        with on_disk("a checkpoint", self.folder.parent):
            self._save(run, best)

    def _save(self, run: dict[str, Any], best: dict[str, Tensor] | None) -> None:
        new = self.folder / f"{CHECKPOINT}.new"
        if self._accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(new / TRAINER))
        if self._accelerator.is_main_process:
            if best is not None:
                save_file(best, new / BEST)
            (new / RUN).write_text(json.dumps(run), encoding="utf-8")
            for file in (path for path in new.rglob("*") if path.is_file()):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            old = self.folder / f"{CHECKPOINT}.old"
            current = self.folder / CHECKPOINT
            shutil.rmtree(old, ignore_errors=True)
            if current.exists():
                current.rename(old)
            new.rename(current)
            shutil.rmtree(old, ignore_errors=True)
        self._accelerator.wait_for_everyone()

    def load(self) -> dict[str, Tensor] | None:
        """Put the last checkpoint's weights and optimizer into what accelerate has prepared; returns the best state."""
        current = self.folder / CHECKPOINT
        self._accelerator.load_state(str(current / TRAINER))
        return load_file(current / BEST) if (current / BEST).is_file() else None

    def _recover(self) -> None:
        """A run that died between two renames has left its checkpoint under another name."""
        for name in (f"{CHECKPOINT}.new", f"{CHECKPOINT}.old"):
            other = self.folder / name
            if not (self.folder / CHECKPOINT).exists() and self._read(other / RUN):
                other.rename(self.folder / CHECKPOINT)

    def remove(self) -> None:
        """Nothing is left to go on from."""
        self._removed = True
        if self._accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
