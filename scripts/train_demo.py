"""Make the embedded demo: split a CC BY book, train a byte-level BPE tokenizer and a small GQA Llama on it.

    python scripts/train_demo.py --book anthropology_cc_by.txt.gz --out mla_demo

writes OUT/calibration.txt.gz and OUT/evaluation.txt.gz (slices of the book; the second is never trained
on), OUT/model/ (config, bfloat16 weights, tokenizer) and OUT/training.json (settings and perplexities). The
book is small, so the training is regularised hard: dropout on the embeddings, on the attention weights and
on every block's output, weight decay, BPE-dropout (each section is re-segmented in every epoch) and an
exponential moving average of the weights, of which the state with the best development perplexity is kept.

The text slices are the same in every run. The weights depend on the seed, and repeat on one machine with
one set of library versions as long as the --minutes limit does not bind.
"""

import argparse
import copy
import gzip
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
SECTION_BREAK = "\n\n\n"
BACK_MATTER = {"Critical Thinking Questions", "Suggested Readings", "Bibliography", "References"}
LONG_PARAGRAPH = 60  # characters from which a paragraph may not occur in two parts
WINDOW = 1024  # tokens of an evaluation window
LONG, SHORT = 2048, 512  # tokens of a training sequence
SAMPLE_PROMPT = "Anthropologists use the term culture to"


@dataclass
class Parts:
    """The sections of the book by their use; calibration is a selection of the training sections."""

    train: list[str]
    dev: list[str]
    evaluation: list[str]
    calibration: list[str]


def read_sections(book: Path) -> list[str]:
    """Return the book's sections, without its preface and the back matter of its chapters."""
    text = gzip.decompress(book.read_bytes()).decode("utf-8")
    sections = []
    for section in text.split(SECTION_BREAK):
        paragraphs = section.strip("\n").split("\n\n")
        ends = [i for i, paragraph in enumerate(paragraphs) if paragraph.strip() in BACK_MATTER]
        kept = paragraphs[: ends[0]] if ends else paragraphs
        if kept and kept[0].strip() not in {"", "Preface"}:
            sections.append("\n\n".join(kept))
    return sections


def without_repeats(sections: list[str], others: list[str]) -> list[str]:
    """Drop from the sections every long paragraph that also occurs in the others."""
    known = {p for section in others for p in section.split("\n\n") if len(p) >= LONG_PARAGRAPH}
    cleaned = ("\n\n".join(p for p in section.split("\n\n") if p not in known) for section in sections)
    return [section for section in cleaned if section]


def split_book(sections: list[str]) -> Parts:
    """Spread the parts evenly over the book: of twenty sections, two for evaluation, one for dev."""
    evaluation = [s for i, s in enumerate(sections) if i % 10 == 5]
    dev = without_repeats([s for i, s in enumerate(sections) if i % 20 == 12], evaluation)
    rest = [s for i, s in enumerate(sections) if i % 10 != 5 and i % 20 != 12]
    train = without_repeats(rest, evaluation + dev)
    return Parts(train, dev, evaluation, calibration=train[2::5])


def joined(sections: list[str]) -> str:
    """Return the sections as one text."""
    return SECTION_BREAK.join(sections) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write gzip bytes that depend on nothing but the text."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        file.write(text.encode("utf-8"))


def train_tokenizer(sections: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        # Every byte has a token, whatever the training text holds. Sorted, because the alphabet comes in no fixed
        # order.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sections, trainer)
    return tokenizer


class Segmenter:
    """Splits words into tokens by the tokenizer's merges, of which each is skipped with some probability.

    `BPE(dropout=...)` of tokenizers does the same, but cannot be seeded.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        """Read the merges of `tokenizer`; `seed` is that of the dropout."""
        model = json.loads(tokenizer.to_str())["model"]
        pairs = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"])
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.vocab: dict[str, int] = model["vocab"]
        self.random = random.Random(seed)

    def __call__(self, word: str, dropout: float) -> list[int]:
        """Return the tokens of a word; without dropout, those that the tokenizer gives."""
        parts = list(word)
        while True:
            found = [
                (self.ranks[pair], i)
                for i, pair in enumerate(pairwise(parts))
                if pair in self.ranks and (dropout == 0 or self.random.random() >= dropout)
            ]
            if not found:
                return [self.vocab[part] for part in parts]
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


class TrainingText:
    """The training sections as words; each word has its usual segmentation and some of BPE-dropout."""

    def __init__(self, sections: list[str], tokenizer: Tokenizer, dropout: float, variants: int, seed: int) -> None:
        """Segment every word of `sections` once as usual, and `variants` times with `dropout`."""
        assert tokenizer.pre_tokenizer is not None
        segment = Segmenter(tokenizer, seed)
        words: dict[str, int] = {}
        self.sections = []
        for section in sections:
            split = tokenizer.pre_tokenizer.pre_tokenize_str(section)
            self.sections.append([words.setdefault(word, len(words)) for word, _ in split])
        self.usual = [segment(word, 0.0) for word in words]
        self.drawn = [[segment(word, dropout) for word in words] for _ in range(variants if dropout else 0)]
        # The slices join sections by blank lines, and documents end with END: the model sees both.
        self.breaks = [[tokenizer.token_to_id(END)], tokenizer.encode(SECTION_BREAK).ids]
        # `Segmenter` repeats the library's algorithm; a difference would train the model on tokens that it never reads
        # later.
        if list(self.tokens(0)) != tokenizer.encode(sections[0]).ids:
            raise RuntimeError("the segmentation without dropout differs from the tokenizer's")
        self.length = sum(len(self.usual[word]) for section in self.sections for word in section)

    def tokens(self, section: int, choices: np.ndarray | None = None) -> Iterator[int]:
        """Yield a section's tokens: the usual ones, or of each word the drawn ones of the given number."""
        words = self.sections[section]
        if choices is None:
            return chain.from_iterable(self.usual[word] for word in words)
        return chain.from_iterable(self.drawn[k][word] for word, k in zip(words, choices, strict=True))

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Return all sections in a new order as rows of LONG tokens, about half of them re-segmented."""
        stream: list[int] = []
        for section in rng.permutation(len(self.sections)):
            resegment = bool(self.drawn) and rng.random() < 0.5
            choices = rng.integers(len(self.drawn), size=len(self.sections[section])) if resegment else None
            stream.extend(self.tokens(section, choices))
            stream.extend(self.breaks[rng.integers(2)])
        # Every epoch cuts the text at other places.
        stream = stream[rng.integers(LONG) :]
        rows = np.array(stream[: len(stream) // LONG * LONG]).reshape(-1, LONG)
        return rng.permutation(rows)

    def batches(self, rng: np.random.Generator, batch_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (epoch, batch) without end; three in four hold SHORT sequences, the others LONG ones."""
        size = max(1, batch_tokens // LONG)
        epoch = 0
        while True:
            epoch += 1
            rows = self.epoch(rng)
            for start in range(0, len(rows) - size + 1, size):
                width = LONG if rng.random() < 0.25 else SHORT
                yield epoch, torch.from_numpy(rows[start : start + size].reshape(-1, width))


def new_model(vocab_size: int, end: int, attention_dropout: float) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        max_position_embeddings=LONG,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_dropout=attention_dropout,
        bos_token_id=end,
        eos_token_id=end,
        rope_theta=10000.0,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop values of the embeddings and of each block's attention and MLP outputs while training."""

    def hook(module: torch.nn.Module, _: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], probability, module.training), *output[1:])
        return torch.nn.functional.dropout(output, probability, module.training)

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: list[int], window: int = WINDOW) -> float:
    """Perplexity per token over non-overlapping windows, of each all tokens but the first."""
    device = next(model.parameters()).device
    tokens = torch.tensor(ids, device=device)
    full = len(ids) // window * window
    groups = list(tokens[:full].reshape(-1, window).split(8)) if full else []
    # A rest of one token has nothing to predict.
    if len(ids) - full >= 2:
        groups.append(tokens[full:][None])
    loss, count = 0.0, 0
    for group in groups:
        logits = model(input_ids=group).logits[:, :-1].float()
        targets = group[:, 1:].reshape(-1)
        loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
        count += targets.numel()
    return math.exp(loss / count)


def unigram_perplexity(train: list[int], ids: list[int], vocab_size: int) -> float:
    """Perplexity of the training frequencies (add one) on the ids."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return math.exp(-np.log(counts / counts.sum())[ids].mean())


class Training:
    """The training loop's state: model, moving average, optimiser, and the best average seen so far."""

    def __init__(self, model: LlamaForCausalLM, args: argparse.Namespace) -> None:
        """Place the model and its moving average on the device of `args`."""
        self.args = args
        self.device = torch.device(args.device)
        self.average = copy.deepcopy(model).to(self.device).eval()
        self.model = model.to(self.device).train()
        add_dropout(self.model, args.dropout)
        # Only matrices are decayed: the weights of norms are scales around 1.
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=fused)
        self.started = time.monotonic()
        self.step = 0
        self.best = math.inf
        self.best_step = 0
        self.best_state: dict[str, torch.Tensor] = {}

    def progress(self) -> float:
        """Return the spent share of the steps or of the minutes, whichever is larger."""
        steps = self.step / self.args.steps
        minutes = (time.monotonic() - self.started) / 60
        return max(steps, minutes / self.args.minutes if self.args.minutes else 0.0)

    def update(self, batch: torch.Tensor) -> torch.Tensor:
        """Take one step, of the model and of its average, and return the loss."""
        warmup = min(1.0, (self.step + 1) / self.args.warmup)
        rate = self.args.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # A short memory at first, or the average would hold the random initial weights for hundreds of steps.
        keep = min(self.args.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return loss.detach()

    def measure(self, dev: list[int], epoch: int, loss: torch.Tensor) -> bool:
        """Print the development perplexity, keep the best state, and say whether to go on."""
        value = perplexity(self.average, dev)
        better = value < self.best
        if better:
            self.best, self.best_step = value, self.step
            self.best_state = {k: v.detach().to("cpu", copy=True) for k, v in self.average.state_dict().items()}
        seconds = time.monotonic() - self.started
        mark = "*" if better else ""
        place = f"epoch {epoch:4d} step {self.step:6d} {seconds:6.0f} s"
        print(f"{place} train loss {loss:.3f} dev ppl {value:.2f}{mark}", flush=True)
        return self.step - self.best_step <= self.args.patience and self.progress() < 1

    def run(self, text: TrainingText, dev: list[int]) -> None:
        """Train until the schedule ends or the patience does; measure after each epoch."""
        losses: list[torch.Tensor] = []
        last = 1
        for epoch, batch in text.batches(np.random.default_rng(self.args.seed), self.args.batch_tokens):
            if losses and (epoch != last or self.progress() >= 1):
                if not self.measure(dev, last, torch.stack(losses).mean()):
                    return
                losses, last = [], epoch
            losses.append(self.update(batch))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint in bfloat16, with a tokenizer that every transformers release can load."""
    model = model.to("cpu", torch.bfloat16)
    # It belongs to this training; transformers would apply it whenever somebody trains the model.
    model.config.attention_dropout = 0.0
    end = model.config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    # A conversion reads the licence from the card's metadata.
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nSee ATTRIBUTION.md.\n", encoding="utf-8")
    # safetensors writes mode 0600, whatever the umask is.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": LONG,
        "clean_up_tokenization_spaces": False,
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def report(folder: Path, parts: Parts, device: str) -> dict[str, float | int]:
    """Load the saved checkpoint the usual way and measure it on the evaluation text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    ids, train, calibration = (
        tokenizer(joined(part), verbose=False)["input_ids"]
        for part in (parts.evaluation, parts.train, parts.calibration)
    )
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt").to(device)
    written = model.generate(**prompt, max_new_tokens=60, do_sample=False, repetition_penalty=1.2)
    print("sample:", tokenizer.decode(written[0]))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(train),
        "evaluation_tokens": len(ids),
        "evaluation_perplexity": round(perplexity(model, ids), 3),
        "calibration_perplexity": round(perplexity(model, calibration), 3),
        "unigram_perplexity": round(unigram_perplexity(train, ids, len(tokenizer)), 3),
        "uniform_perplexity": len(tokenizer),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--book", type=Path, required=True, help="the book's text, gzip-compressed")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--minutes", type=float, default=4.0, help="shorten the schedule to this time; 0: no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=8 * LONG)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.3, help="of embeddings and block outputs")
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--bpe-dropout", type=float, default=0.1, help="probability of skipping a merge")
    parser.add_argument("--bpe-variants", type=int, default=8, help="drawn segmentations of each word")
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the weights' moving average")
    parser.add_argument("--patience", type=int, default=800, help="steps without a better dev perplexity")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    """Make the demo."""
    args = parse_arguments()
    # cuBLAS repeats its results only with a fixed workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    parts = split_book(read_sections(args.book))
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "calibration.txt.gz", joined(parts.calibration))
    write_text(args.out / "evaluation.txt.gz", joined(parts.evaluation))
    tokenizer = train_tokenizer(parts.train, args.vocab_size)
    text = TrainingText(parts.train, tokenizer, args.bpe_dropout, args.bpe_variants, args.seed)
    dev = tokenizer.encode(joined(parts.dev)).ids
    print(f"{text.length} training and {len(dev)} dev tokens, device {args.device}", flush=True)
    model = new_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(END), args.attention_dropout)
    training = Training(model, args)
    training.run(text, dev)
    training.average.load_state_dict(training.best_state)
    save(training.average, tokenizer, args.out / "model")
    figures = report(args.out / "model", parts, args.device)
    settings = {k: v for k, v in vars(args).items() if k not in {"book", "out"}}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    best = {"best_step": training.best_step, "dev_perplexity": round(training.best, 3)}
    record = {**figures, **best, "settings": settings, "versions": versions}
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
