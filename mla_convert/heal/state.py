"""Checkpoints of a healing run, in a folder beside the output; deleted when the output is complete."""

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

from mla_convert.core.errors import MlaConvertError, ResourceError
from mla_convert.core.files import on_disk, remove, write_file
from mla_convert.heal.teacher_student import checkpoint_name

IDENTITY, RUN, BEST, TRAINER = "identity.json", "run.json", "best.safetensors", "trainer"
CHECKPOINT = "checkpoint"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def state_folder(out: Path) -> Path:
    """Folder of the state of the run that writes `out`."""
    return out.parent / f".{out.name}.heal"


def trained_parameters(accelerator: Accelerator, model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a model that is not sharded, by their names in the checkpoint."""
    return {
        checkpoint_name(name): parameter
        for name, parameter in accelerator.unwrap_model(model).named_parameters()
        if parameter.requires_grad
    }


def trained_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors, float32 on the CPU, by their names in the checkpoint.

    Adapters are NAME.lora_A.weight and NAME.lora_B.weight. Every process must call this; only the main one is sure to get
    all tensors.
    """
    inner = accelerator.unwrap_model(model)
    trained = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
    full = (
        accelerator.get_state_dict(model) if accelerator.distributed_type in SHARDED else dict(inner.named_parameters())
    )
    tensors = {name.removeprefix("module."): tensor for name, tensor in full.items()}
    return {
        # A copy, because training goes on in the same memory. `default` is the name that peft gives to an adapter.
        checkpoint_name(name).replace(".default.", "."): tensors[name].detach().float().cpu().clone()
        for name in sorted(trained & tensors.keys())
    }


def _differing(before: Any, now: dict[str, Any]) -> str:
    """The parts of an identity that changed, in words."""
    words = {"original": "the original", "converted": "the converted model", "text": "the text to train on",
             "settings": "a setting", "engine": "the device or the number of processes", "versions": "a library"}  # fmt: skip
    changed = [words.get(key, key) for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
    return " and ".join(changed) or "the identity"


class StateFolder:
    """The folder of one run's state, locked while the run lasts; used as a context."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        accelerator: Accelerator,
        note: Callable[[str], None] = lambda words: None,
    ):
        """Lock the folder, and delete the state of an earlier run with another identity.

        Args:
            folder: of the state.
            identity: the run's inputs and settings, as JSON; a checkpoint is of use only while all are the same.
            accelerator: of this process.
            note: told in words why an earlier state is deleted.

        Raises:
            ResourceError: another run uses the folder, or the disk does not suffice.
        """
        self._note = note
        self.folder, self._accelerator, self._removed = folder, accelerator, False
        # As it comes back from the file: tuples become lists, paths become strings.
        self._identity = json.loads(json.dumps(identity, sort_keys=True, default=str))
        # Beside the folder, because the folder may be deleted and made again under the lock.
        self._lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        if accelerator.is_main_process:
            try:
                with on_disk("the state of the run", folder.parent):
                    self._open()
            except BaseException:
                # `__exit__` is not called after an error here.
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
            # First, so that a checkpoint that a kill left under its temporary name is reported, too.
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
        # a run that stopped resumes from its last checkpoint; without one there is nothing to keep
        if error is None or self._removed:
            return
        last = self.last()
        if last is None:
            self.remove()
        elif isinstance(error, KeyboardInterrupt | MlaConvertError):
            kept = f"a checkpoint after {last['step']} steps is in {self.folder}: run the same command to continue, or delete it"
            error.args = ("; ".join([*map(str, error.args), kept]),)

    @staticmethod
    def _read(file: Path) -> Any:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def remember(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Compute a result once, in the main process, for all processes and for runs that resume.

        Args:
            name: of its file in the folder.
            make: computes the result, as JSON.
        """
        file = self.folder / name
        if self._accelerator.is_main_process and self._read(file) is None:
            content = json.dumps(make())
            with on_disk("the state of the run", self.folder.parent):
                write_file(file, content)
        self._accelerator.wait_for_everyone()
        return self._read(file)

    def last(self) -> dict[str, Any] | None:
        """The `run` of the last complete checkpoint; None if there is none."""
        return self._read(self.folder / CHECKPOINT / RUN)

    def save(self, run: dict[str, Any], best: dict[str, Tensor] | None, trained: bool = False) -> None:
        """Write a checkpoint, then replace the last one with it. Every process must call this.

        Args:
            run: progress of the run, as JSON.
            best: the trained tensors with the least held-out loss, if they are not the start.
            trained: whether the training is over, so that nothing else of it is needed.

        Raises:
            ResourceError: the disk does not suffice; the last checkpoint stays.
        """
        with on_disk("a checkpoint", self.folder.parent):
            self._save(run, best, trained)

    def _save(self, run: dict[str, Any], best: dict[str, Tensor] | None, trained: bool) -> None:
        new = self.folder / f"{CHECKPOINT}.new"
        if self._accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
        self._accelerator.wait_for_everyone()
        # Every process writes its own part, so the folder has to be there before any of them begins.
        if not trained:
            self._accelerator.save_state(str(new / TRAINER))
        if self._accelerator.is_main_process:
            if best is not None:
                save_file(best, new / BEST)
            (new / RUN).write_text(json.dumps(run), encoding="utf-8")
            # accelerate does not sync, and the renames below must not reach the disk before the bytes do.
            for file in (path for path in new.rglob("*") if path.is_file()):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            old = self.folder / f"{CHECKPOINT}.old"
            current = self.folder / CHECKPOINT
            shutil.rmtree(old, ignore_errors=True)
            # No rename replaces a folder that holds files. `_recover` mends a kill between these renames.
            if current.exists():
                current.rename(old)
            new.rename(current)
            shutil.rmtree(old, ignore_errors=True)
        self._accelerator.wait_for_everyone()

    def trained(self) -> bool:
        """Whether the last checkpoint is that of a training that was over."""
        return self.last() is not None and not (self.folder / CHECKPOINT / TRAINER).exists()

    def load(self) -> dict[str, Tensor] | None:
        """Load the last checkpoint into the objects that accelerate prepared; returns its `best`."""
        self._accelerator.load_state(str(self.folder / CHECKPOINT / TRAINER))
        return self.best()

    def best(self) -> dict[str, Tensor] | None:
        """The `best` of the last checkpoint."""
        file = self.folder / CHECKPOINT / BEST
        return load_file(file) if file.is_file() else None

    def _recover(self) -> None:
        """Rename the checkpoint of a run that died between two renames."""
        # run.json is written last, so a folder that has one is complete; the newer of the two counts.
        for name in (f"{CHECKPOINT}.new", f"{CHECKPOINT}.old"):
            other = self.folder / name
            if not (self.folder / CHECKPOINT).exists() and self._read(other / RUN):
                other.rename(self.folder / CHECKPOINT)

    def remove(self) -> None:
        """Delete the state."""
        self._removed = True
        if self._accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
