"""The training loop of healing, on accelerate: one process, DDP, FSDP2 or DeepSpeed, whichever it was launched with."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from mla_convert.core.progress import Progress
from mla_convert.core.units import human_tokens
from mla_convert.heal import data
from mla_convert.heal.cuda_graph import GraphedStep
from mla_convert.heal.data import Corpus, Schedule, Window
from mla_convert.heal.settings import HealSettings
from mla_convert.heal.state import StateFolder, trained_state
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.modeling.loss_terms import IGNORED

# By what is trained. For adapters, which start at zero, absolute; else relative to each parameter's root mean square.
RATES = {"attention": 0.004, "all": 0.001, "lora": 1e-3}
BETAS = (0.9, 0.95)
MIN_SCALE = 1e-3  # a parameter smaller than this (a zero bias, say) moves as if it had this root mean square
WARMUP_SHARE, WARMUP_MAX = 0.05, 100
FLOOR = 0.02  # of the peak rate, at the end
CLIP = 1.0
COMPILE_FROM = 4_000_000  # tokens on a GPU: compiling takes half a minute, and a graph of a pass its memory once more
# SPIKES steps in a row whose loss is above SPIKE times the median of the RECENT ones before end the run.
SPIKE, RECENT, SPIKES = 3.0, 50, 5
ASK_EVERY = 16  # steps between asking all processes whether a checkpoint is due


@dataclass
class Run:
    """How far a run is. `curve` has an entry for every look at the held-out windows, the start included."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_tokens: int = 0
    lowest: float = math.inf  # of the looks behind the start
    waited: int = 0
    noted: int = 0  # losses that are in the curve
    stopped: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def scheduled(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to FLOOR: the share of the peak rate at a step."""
    warm = max(1, min(WARMUP_MAX, round(steps * WARMUP_SHARE)))
    if step < warm:
        return (step + 1) / warm
    return scheduled_at((step - warm) / max(1, steps - warm))


def scheduled_at(done: float) -> float:
    """The cosine alone: the share of the peak rate where a share of the run is `done`."""
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(pair: TeacherStudent, settings: HealSettings) -> torch.optim.Optimizer:
    """AdamW without decay; parameters of about equal magnitude share a group and its rate."""
    lr = settings.lr or RATES[settings.train]
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in (p for p in pair.parameters() if p.requires_grad):
        rate = lr
        if settings.train != "lora":
            scale = float(parameter.detach().float().square().mean().sqrt().clamp_min(MIN_SCALE))
            rate *= 2 ** (round(2 * math.log2(scale)) / 2)
        groups.setdefault(rate, []).append(parameter)
    fused = all(p.is_cuda for each in groups.values() for p in each)
    found = [{"params": each, "lr": rate, "peak": rate} for rate, each in sorted(groups.items())]
    return torch.optim.AdamW(found, betas=BETAS, weight_decay=0.0, fused=fused)


class Trainer:
    """One healing run. All processes call the same methods in the same order."""

    def __init__(
        self,
        accelerator: Accelerator,
        pair: TeacherStudent,
        corpus: Corpus,
        settings: HealSettings,
        state: StateFolder,
        progress: Progress,
        vocabulary: Tensor | None = None,
    ):
        """Takes the pair over; goes on from the state folder's last checkpoint if there is one.

        `vocabulary` (V,) are the tokens that noise is drawn from: needed where the settings have noise.
        """
        self.accelerator, self.settings, self.state, self.progress = accelerator, settings, state, progress
        cuda = accelerator.device.type == "cuda"
        mix = settings.mix(getattr(pair.student.config, "max_position_embeddings", None))
        self.step_tokens, self.micro_tokens = step_sizes(settings, mix, cuda)
        self.corpus = corpus
        self._vocabulary = vocabulary
        steps = max(1, round(settings.tokens / self.step_tokens))
        processes = accelerator.num_processes
        share = settings.self_share
        self.schedule = Schedule(corpus, mix, self.step_tokens, steps, settings.seed, processes, share)
        if settings.gradient_checkpointing:
            pair.checkpoint_gradients()
        long = cuda and settings.tokens >= COMPILE_FROM
        if fast := long if settings.compile is None else settings.compile:
            pair.compile()
        self.model, self.optimizer = accelerator.prepare(pair, make_optimizer(pair, settings))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # several processes exchange gradients on the way; layers run again keep the state of the random generator
        alone = cuda and accelerator.distributed_type == DistributedType.NO
        capture = fast and alone and not settings.gradient_checkpointing
        self._pass = GraphedStep(self._forward_backward, self.parameters, capture)
        self.run, self.best = Run(), None
        if (last := state.last()) is not None:
            self.best = state.load()
            self.run = Run(**last)
        length = mix[0][0]
        self._looks, most = data.looks(settings.tokens, settings.evaluations)
        self._watched = data.held_out(corpus, length, share, most), data.held_length(corpus, length)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return len(self.schedule.steps)

    def train(self) -> Run:
        """Train until the tokens are used up, or until it no longer pays; the best state is in `best` then."""
        run, settings = self.run, self.settings
        every = max(1, round(self.steps / self._looks))
        saved = shown = time.perf_counter()
        began = saved - run.seconds
        if not run.curve:
            self._look(began)
        self.progress.begin("heal", self.steps, run.step)
        fresh, fresh_tokens, last = time.perf_counter(), 0, None
        try:
            while run.step < self.steps and run.stopped is None:
                found = self._step(run.step)
                fresh_tokens += self.schedule.tokens(run.step)
                run.tokens += self.schedule.tokens(run.step)
                run.step += 1
                # read one step late, so that the device never waits for us
                self._note_loss(last)
                last = found
                self.progress.advance(run.step)
                if run.step % every == 0 or run.step == self.steps:
                    self._note_loss(last)
                    last = None
                    if run.stopped is None:
                        self._look(began)
                now = time.perf_counter()
                if (
                    self._agreed(now - saved > 60 * settings.checkpoint_minutes)
                    and run.stopped is None
                    and run.step < self.steps
                ):
                    self._note_loss(last)
                    last, run.seconds = None, now - began
                    if run.stopped is None:
                        self.state.save(vars(run), self.best)
                        saved = time.perf_counter()
                if now - shown > 10 or self.progress.verbose:
                    shown = now
                    self._say(fresh_tokens / (now - fresh))
        finally:
            self.progress.stop()
        self._note_loss(last)
        run.seconds = round(time.perf_counter() - began, 2)
        return run

    def _agreed(self, wish: bool) -> bool:
        """The main process's wish: clocks differ, and all must do the same. Asked now and then, as asking takes a wait."""
        if self.accelerator.num_processes == 1:
            return wish
        if self.run.step % ASK_EVERY:
            return False
        flag = torch.tensor([float(wish and self.accelerator.is_main_process)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _say(self, speed: float) -> None:
        run, left = self.run, (self.steps - self.run.step) * self.step_tokens
        looked = run.curve[-1]
        loss = f"loss {run.losses[-1]:.4f}  " if run.losses else ""
        self.progress.note(
            f"heal {human_tokens(run.tokens)} of {human_tokens(run.tokens + left)} tokens  {loss}held out: KL {looked['kl']:.4f}, "
            f"perplexity ×{looked['ratio']:.4f}  {human_tokens(speed)} tokens/s, about {left / speed:.0f} s left"
        )

    def _note_loss(self, found: Tensor | None) -> None:
        """Take a step's loss into the record, and stop at what is not finite or has run away."""
        if found is None:
            return
        run, (loss, norm) = self.run, found.tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            run.stopped = "the loss was not finite"
            return
        run.losses.append(round(loss, 6))
        before, last = run.losses[-RECENT - SPIKES : -SPIKES], run.losses[-SPIKES:]
        if len(before) == RECENT and min(last) > SPIKE * statistics.median(before):
            run.stopped = "the loss ran away"

    def _step(self, step: int) -> Tensor:
        """One optimizer step over this process's share of the windows; (2,) loss over all of them and gradient norm."""
        accelerator, (length, windows) = self.accelerator, self.schedule.step(step)
        own = [*enumerate(windows)][accelerator.process_index :: accelerator.num_processes]
        size = max(1, self.micro_tokens // length)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        factor = scheduled(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        total = torch.zeros((), device=accelerator.device)
        for index, part in enumerate(parts):
            accelerator.sync_gradients = index == len(parts) - 1
            batch = self._batch(step, part, length).to(accelerator.device)
            with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(self.model):
                total += self._pass(batch, len(part) / len(own), first=index == 0)
        norm = accelerator.clip_grad_norm_(self.parameters, CLIP)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm, device=total.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self._pass.capture)
        return torch.stack([accelerator.reduce(total, "mean"), norm.float()])

    def _forward_backward(self, ids: Tensor, labels: Tensor, positions: Tensor | None, share: float) -> Tensor:
        """Add the gradients of `share` times a batch's loss, and give that."""
        loss = self.model(ids, labels, positions)[0] * share
        self.accelerator.backward(loss)
        return loss.detach()

    def _batch(self, step: int, windows: list[tuple[int, Window]], length: int) -> data.Batch:
        """Windows with their number in the step; the odd ones are noised, if any is."""
        batch = self._cut([window.begin for _, window in windows], length)
        if not self.settings.noise:
            return batch
        keys = [(self.settings.seed, step, number) if window.odd else None for number, window in windows]
        return data.noised(batch, self.settings.noise, self._vocabulary, keys)

    def _cut(self, begins: list[int], length: int) -> data.Batch:
        """Windows of the corpus, trained on or held out.

        The labels of what the original wrote are drawn from its prediction: their cross-entropy says in one token, with
        noise, what the KL says over the whole vocabulary. Where both are minimised they have none.
        """
        batch = data.cut(self.corpus, begins, length)
        if self.settings.ce_weight and self.settings.kl_weight:
            batch.labels[torch.tensor(begins) < self.corpus.added] = IGNORED
        return batch

    def _look(self, began: float) -> None:
        """Measure on the held-out windows, and keep the state if none was better."""
        run, found = self.run, self.held_out()
        loss = found.pop("loss")
        recent, run.noted = run.losses[run.noted :], len(run.losses)
        run.curve.append({"tokens": run.tokens, "seconds": round(time.perf_counter() - began, 1), **found,
                          "loss": round(statistics.fmean(recent), 6) if recent else None})  # fmt: skip
        if not math.isfinite(loss):
            run.stopped = "the loss was not finite"
            return
        if loss < run.best:
            run.best, run.best_tokens = loss, run.tokens
            self.best = trained_state(self.accelerator, self.model) if run.tokens else None
        if not run.tokens:
            return  # where little is lost, large steps lose more and small ones gain it back: the start is not what to wait for
        if loss < run.lowest:
            run.lowest, run.waited = loss, 0
        else:
            run.waited += 1
            if run.waited >= self.settings.patience:
                run.stopped = f"{run.waited} looks at the held-out text found nothing better"

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss, KL and both perplexities on the held-out windows, which are shared out among the processes."""
        accelerator, (begins, length) = self.accelerator, self._watched
        size = max(1, self.micro_tokens // length)
        total = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
        count, index = accelerator.num_processes, accelerator.process_index
        for number in range(-(-len(begins) // (size * count))):
            start = (number * count + index) * size
            own = begins[start : start + size]
            # every process runs the model equally often, as sharded weights are gathered by all; the odd ones weigh nothing
            batch = self._cut(own or begins[:1], length).to(accelerator.device)
            _, sums = self.model(batch.ids, batch.labels, batch.positions)
            if own:
                total[:4] += sums.double() * batch.ids.numel()
                total[4] += (batch.labels != IGNORED).sum()
        loss, kl, ce, ce_original, labels = accelerator.reduce(total, "sum").tolist()
        tokens, ce, ce_original = len(begins) * length, ce / labels, ce_original / labels
        return {
            "loss": loss / tokens,
            "kl": round(kl / tokens, 6),
            "perplexity": round(math.exp(min(ce, 700.0)), 4),
            "ratio": round(math.exp(min(ce - ce_original, 700.0)), 5),
        }


def step_sizes(settings: HealSettings, mix: tuple[tuple[int, float], ...], cuda: bool) -> tuple[int, int]:
    """Tokens of a step over all processes, and of a forward pass of one: what was set, or what suits the run's length.

    A run has at least some 500 steps, or steps as small as the device likes; large steps give less noise than they cost.
    """
    largest, smallest = (1 << 15, 1 << 13) if cuda else (1 << 13, 1 << 12)
    longest = max(length for length, _ in mix)
    step = settings.step_tokens or min(largest, max(smallest, 1 << round(math.log2(max(1, settings.tokens / 500)))))
    return max(step, longest), settings.micro_tokens or (1 << 14 if cuda else 1 << 12)
