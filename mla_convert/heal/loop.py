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
from torch import Tensor

from mla_convert.core.progress import Progress
from mla_convert.core.units import human_tokens
from mla_convert.heal import windows
from mla_convert.heal.cuda_graph import GraphedStep
from mla_convert.heal.data import Corpus
from mla_convert.heal.schedule import Schedule, Window
from mla_convert.heal.settings import HealSettings
from mla_convert.heal.state import StateFolder, trained_state
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.method.refine.relative_adam import BestState, RelativeAdam, set_rates, warmup_cosine
from mla_convert.modeling.loss_terms import IGNORED

# Peak learning rates by the parameters that are trained: relative to each one's root mean square, absolute for adapters.
# docs/research/healing.md has the rates that were tried; that of adapters has not been measured.
RATES = {"attention": 0.004, "all": 0.001, "lora": 1e-3}
# Width of the model on which they were measured. A wider one takes smaller steps: at 1536 a rate of 0.001 raised the held-out KL.
RATES_WIDTH = 576
BETAS = (0.9, 0.95)
# Steps of warm-up, as a fraction of all and at most; learning rate at the end, as a fraction of the peak.
WARMUP_FRACTION, WARMUP_MAX, FLOOR = 0.05, 100, 0.02
GRADIENT_NORM = 1.0
COMPILE_FROM = 4_000_000  # tokens on a GPU: compiling takes half a minute, and a graph of a pass its memory once more
# SPIKES steps in a row with a loss above SPIKE times the median of the RECENT ones before end the run.
SPIKE, RECENT, SPIKES = 3.0, 50, 5
AGREE_EVERY = 16  # steps between agreements of all processes on whether a checkpoint is due
NOTE_SECONDS = 10  # between lines of progress


@dataclass
class Run:
    """Progress of a healing run, kept in its checkpoints."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf  # held-out loss of the best state, on the kind of text where it is largest
    best_tokens: int = 0
    share: float = 1.0  # of the way from the start to that state, at which the kept weights lie
    lowest: float = math.inf  # held-out loss, the start not counted
    patience_used: int = 0  # evaluations since `lowest`
    losses_evaluated: int = 0  # losses that the curve accounts for
    stopped: str | None = None
    curve: list[dict[str, Any]] = field(
        default_factory=list
    )  # one entry for each held-out evaluation, the start included
    losses: list[float] = field(default_factory=list)


def rate_factor(step: int, steps: int) -> float:
    """Fraction of the peak learning rate at a step: linear warm-up, then a cosine to FLOOR."""
    return warmup_cosine(step, steps, max(1, min(WARMUP_MAX, round(steps * WARMUP_FRACTION))), FLOOR)


def peak_rate(settings: HealSettings, width: int) -> float:
    """Peak learning rate of a run: the one that is set, or that of the parameters that are trained.

    The default falls with the width of the residual stream, as rates of Adam do (muP, arXiv 2203.03466).

    Args:
        settings: of the run.
        width: of the model's residual stream.
    """
    if settings.lr is not None:
        return settings.lr
    return RATES[settings.train] * (1 if settings.train == "lora" else min(1.0, RATES_WIDTH / width))


def make_optimizer(pair: TeacherStudent, settings: HealSettings) -> RelativeAdam:
    """The optimizer of the parameters that are trained; LoRA's, which start at zero, have an absolute rate."""
    parameters = [parameter for parameter in pair.parameters() if parameter.requires_grad]
    return RelativeAdam(
        parameters,
        peak_rate(settings, pair.student.config.get_text_config().hidden_size),
        BETAS,
        relative=settings.train != "lora",
        grouped=True,
        fused=all(parameter.is_cuda for parameter in parameters),
    )


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
        """Prepare the pair for training, and load the last checkpoint if there is one.

        Args:
            accelerator: of this process.
            pair: on its device; the trainer takes it over.
            corpus: text to train on and to evaluate on.
            settings: of the run.
            state: folder of its checkpoints.
            progress: told of every step.
            vocabulary: token ids (V,) that noise is drawn from; needed where the settings have noise.
        """
        self.accelerator, self.settings, self.state, self.progress = accelerator, settings, state, progress
        self.corpus, self._vocabulary = corpus, vocabulary
        cuda = accelerator.device.type == "cuda"
        mix = settings.mix(getattr(pair.student.config, "max_position_embeddings", None))
        self.step_tokens, self.micro_tokens = step_sizes(settings, mix, cuda)
        steps = max(1, round(settings.tokens / self.step_tokens))
        self.schedule = Schedule(
            corpus, mix, self.step_tokens, steps, settings.seed, accelerator.num_processes, settings.self_share
        )
        if settings.gradient_checkpointing:
            pair.checkpoint_gradients()
        compiled = settings.compile
        if compiled is None:
            compiled = cuda and settings.tokens >= COMPILE_FROM
        if compiled:
            pair.compile()
        self.model, self.optimizer = accelerator.prepare(pair, make_optimizer(pair, settings))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # not with several processes, which exchange gradients in the backward pass, and not with gradient checkpointing,
        # which keeps the state of the random generator
        alone = cuda and accelerator.distributed_type == DistributedType.NO
        capture = compiled and alone and not settings.gradient_checkpointing
        self._pass = GraphedStep(self._forward_backward, self.parameters, capture)
        self.run, best = Run(), None
        if (last := state.last()) is not None:
            best = state.load()
            self.run = Run(**last)
        self._best = BestState(self.run.best, best)
        length = mix[0][0]
        self._evaluations, held_out_tokens = windows.evaluations(settings.tokens, settings.evaluations)
        self._held_out = windows.held_out(corpus, length, settings.self_share, held_out_tokens)
        self._held_out_length = windows.held_length(corpus, length)
        for label in dict.fromkeys(part[0] for part in corpus.held_out_ranges()):
            if label not in self._held_out:
                counted = " with an answer" if corpus.counted is not None else ""
                progress.note(f"{label} is too short for a held-out window{counted}: its KL is not watched")
        self._began = 0.0
        self._pending: Tensor | None = None  # loss and gradient norm of the last step

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return len(self.schedule.steps)

    @property
    def best(self) -> dict[str, Tensor] | None:
        """The trained tensors with the least held-out loss, by their names in the checkpoint; None if it is the start."""
        return self._best.state

    def train(self) -> Run:
        """Train until the tokens are used up or the run stops early; `best` has the best state then."""
        run = self.run
        every = max(1, round(self.steps / self._evaluations))
        saved = shown = time.perf_counter()
        self._began = saved - run.seconds
        if not run.curve:
            self._evaluate()
        self.progress.begin("heal", self.steps, run.step, noted=True)
        loop_began, tokens_before = time.perf_counter(), run.tokens
        try:
            while run.step < self.steps and run.stopped is None:
                losses = self._step(run.step)
                run.tokens += self.schedule.tokens(run.step)
                run.step += 1
                # the loss is read one step late, so that the device never waits for the host
                self._record_loss()
                self._pending = losses
                self.progress.advance(run.step)
                if run.step % every == 0 or run.step == self.steps:
                    self._record_loss()
                    if run.stopped is None:
                        self._evaluate()
                now = time.perf_counter()
                if self._checkpoint_is_due(now - saved):
                    self._record_loss()
                    run.seconds = now - self._began
                    if run.stopped is None:
                        self.state.save(vars(run), self.best)
                        saved = time.perf_counter()
                if now - shown > NOTE_SECONDS or self.progress.verbose:
                    shown = now
                    self._show_progress((run.tokens - tokens_before) / (now - loop_began))
        finally:
            self.progress.stop()
        self._record_loss()
        run.seconds = round(time.perf_counter() - self._began, 2)
        return run

    def _checkpoint_is_due(self, elapsed: float) -> bool:
        """Whether to write a checkpoint, `elapsed` seconds after the last one; the same in all processes."""
        due = self._agreed(elapsed > 60 * self.settings.checkpoint_minutes)
        return due and self.run.stopped is None and self.run.step < self.steps

    def _agreed(self, wish: bool) -> bool:
        """The main process's wish: clocks differ, and all must do the same. Every AGREE_EVERY steps, as asking blocks."""
        if self.accelerator.num_processes == 1:
            return wish
        if self.run.step % AGREE_EVERY:
            return False
        flag = torch.tensor([float(wish and self.accelerator.is_main_process)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _show_progress(self, speed: float) -> None:
        run, left = self.run, (self.steps - self.run.step) * self.step_tokens
        latest = run.curve[-1]
        loss = f"loss {run.losses[-1]:.4f}  " if run.losses else ""
        self.progress.note(
            f"heal {human_tokens(run.tokens)} of {human_tokens(run.tokens + left)} tokens  {loss}held out: KL {latest['kl']:.4f}, "
            f"perplexity ×{latest['ratio']:.4f}  {human_tokens(speed)} tokens/s, about {left / speed:.0f} s left"
        )

    def _record_loss(self) -> None:
        """Record the loss of the last step, once; stop the run at a loss that is not finite or diverges."""
        if self._pending is None:
            return
        run, (loss, norm) = self.run, self._pending.tolist()
        self._pending = None
        if not math.isfinite(loss) or not math.isfinite(norm):
            run.stopped = "the loss was not finite"
            return
        run.losses.append(round(loss, 6))
        before, last = run.losses[-RECENT - SPIKES : -SPIKES], run.losses[-SPIKES:]
        if len(before) == RECENT and min(last) > SPIKE * statistics.median(before):
            run.stopped = "the loss ran away"

    def _step(self, step: int) -> Tensor:
        """One optimizer step over this process's part of the windows; (2,) loss over all processes and gradient norm."""
        accelerator, (length, chosen) = self.accelerator, self.schedule.step(step)
        mine = [*enumerate(chosen)][accelerator.process_index :: accelerator.num_processes]
        size = max(1, self.micro_tokens // length)
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        set_rates(self.optimizer, rate_factor(step, self.steps))
        total = torch.zeros((), device=accelerator.device)
        for index, part in enumerate(parts):
            accelerator.sync_gradients = index == len(parts) - 1
            batch = self._batch(step, part, length).to(accelerator.device)
            with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(self.model):
                total += self._pass(batch, len(part) / len(mine), first=index == 0)
        norm = accelerator.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm, device=total.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self._pass.capture)
        return torch.stack([accelerator.reduce(total, "mean"), norm.float()])

    def _forward_backward(
        self, ids: Tensor, labels: Tensor, positions: Tensor | None, counted: Tensor | None, grad_scale: float
    ) -> Tensor:
        """Add the gradients of `grad_scale` times a batch's loss, and return that product."""
        loss = self.model(ids, labels, positions, counted)[0] * grad_scale
        self.accelerator.backward(loss)
        return loss.detach()

    def _batch(self, step: int, chosen: list[tuple[int, Window]], length: int) -> windows.Batch:
        """The batch of some windows, each with its number in the step; noise, if any, is in the odd windows."""
        batch = self._cut([window.begin for _, window in chosen], length)
        if not self.settings.noise:
            return batch
        keys = [(self.settings.seed, step, number) if window.odd else None for number, window in chosen]
        return windows.noised(batch, self.settings.noise, self._vocabulary, keys)

    def _cut(self, begins: list[int], length: int) -> windows.Batch:
        """The batch of windows of the corpus, for training or held out."""
        batch = windows.cut(self.corpus, begins, length)
        # The labels of self-generated text are samples of the original's prediction: their cross-entropy is a one-sample,
        # noisy estimate of what the KL computes over the whole vocabulary. Where both are minimised they have none.
        if self.settings.ce_weight and self.settings.kl_weight:
            batch.labels[torch.tensor(begins) < self.corpus.generated] = IGNORED
        return batch

    def _evaluate(self) -> None:
        """Measure on the held-out windows, keep the state if none was better, and stop if patience is used up."""
        run, measured = self.run, self.held_out()
        loss = measured.pop("loss")
        recent, run.losses_evaluated = run.losses[run.losses_evaluated :], len(run.losses)
        run.curve.append({"tokens": run.tokens, "seconds": round(time.perf_counter() - self._began, 1), **measured,
                          "loss": round(statistics.fmean(recent), 6) if recent else None})  # fmt: skip
        if not math.isfinite(loss):
            run.stopped = "the loss was not finite"
            return
        if self._best.update(loss, self._trained_state):
            run.best, run.best_tokens = loss, run.tokens
        if not run.tokens:
            return  # patience does not count from the start: the KL may rise before it falls
        if loss < run.lowest:
            run.lowest, run.patience_used = loss, 0
        else:
            run.patience_used += 1
            if run.patience_used >= self.settings.patience:
                run.stopped = f"no improvement in {run.patience_used} held-out evaluations"

    def _trained_state(self) -> dict[str, Tensor] | None:
        return trained_state(self.accelerator, self.model) if self.run.tokens else None

    def held_out(self) -> dict[str, Any]:
        """Measure on the held-out windows, over all processes.

        Returns:
            `loss` on the kind of text where it is largest; KL (nats a token), perplexity and its ratio to the original's, over
            all kinds; the KL of each kind, if there are several.
        """
        sums = {kind: self._sums(begins) for kind, begins in self._held_out.items()}
        _, kl, ce, ce_original, labels, tokens = torch.stack([*sums.values()]).sum(0).tolist()
        kinds = {kind: round(float(each[1] / each[5].clamp_min(1)), 6) for kind, each in sums.items()}
        ce, ce_original = ce / max(labels, 1), ce_original / max(labels, 1)
        return {
            "loss": float(
                torch.stack([each[0] / each[5].clamp_min(1) for each in sums.values()]).max()
            ),  # NaN if one is
            "kl": round(kl / tokens, 6),
            "perplexity": round(math.exp(min(ce, 700.0)), 4),
            "ratio": round(math.exp(min(ce - ce_original, 700.0)), 5),
            **({"kinds": kinds} if len(kinds) > 1 else {}),
        }

    @torch.no_grad()
    def _sums(self, begins: list[int]) -> Tensor:
        """Sums over windows and processes (6,): loss, KL, cross-entropy, the original's, labels, counted tokens; on the CPU."""
        accelerator, length = self.accelerator, self._held_out_length
        size = max(1, self.micro_tokens // length)
        total = torch.zeros(6, dtype=torch.float64, device=accelerator.device)
        count, index = accelerator.num_processes, accelerator.process_index
        for number in range(-(-len(begins) // (size * count))):
            start = (number * count + index) * size
            mine = begins[start : start + size]
            # all ranks must run the same number of forward passes, as FSDP gathers weights in each; padding has no weight
            batch = self._cut(mine or begins[:1], length).to(accelerator.device)
            _, sums = self.model(batch.ids, batch.labels, batch.positions, batch.counted)
            if mine:
                total[:4] += sums.double() * batch.ids.numel()
                total[4] += (batch.labels != IGNORED).sum()
                total[5] += batch.ids.numel() if batch.counted is None else batch.counted.sum()
        return accelerator.reduce(total, "sum").cpu()


def step_sizes(settings: HealSettings, mix: tuple[tuple[int, float], ...], cuda: bool) -> tuple[int, int]:
    """Tokens of a step and of a forward pass, where none were set.

    A run has at least about 500 steps, or steps of the smallest size that uses the device well; larger steps reduce the
    gradient's noise by less than they cost.

    Args:
        settings: of the run.
        mix: lengths of the windows with their fractions of the tokens.
        cuda: whether the run is on a GPU.

    Returns:
        Tokens of a step over all processes, and of a forward pass of one process.
    """
    largest, smallest = (1 << 15, 1 << 13) if cuda else (1 << 13, 1 << 12)
    longest = max(length for length, _ in mix)
    step = settings.step_tokens or min(largest, max(smallest, 1 << round(math.log2(max(1, settings.tokens / 500)))))
    return max(step, longest), settings.micro_tokens or (1 << 14 if cuda else 1 << 12)
