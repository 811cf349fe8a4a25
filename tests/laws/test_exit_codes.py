"""Every error in the table of docs/reference/exit-codes.md: its code, one line, and nothing on stdout."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import Fault
from filelock import FileLock
from safetensors.torch import load_file, save_file

import mla_convert.pipeline.convert
from mla_convert.cli.main import EXIT_CODES
from mla_convert.core import errors
from mla_convert.core.sums import seal

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "exit-codes.md").read_text()
MEANINGS, TABLE = (
    re.findall(r"^\| (.+?) \| (.+?) \|$", part, re.MULTILINE)[1:] for part in PAGE.split("## Errors and")
)
TABLE = {words: int(code) for words, code in TABLE if code.isdigit()}
REPO = "me/tiny-mla"


class World:
    """Inputs of the cases: sources, a converted folder, options of a conversion that is done in no time."""

    def __init__(self, sources, convert_pico, hub, tmp_path, monkeypatch):
        self.make_source, self.hub, self.path, self.patch = sources, hub, tmp_path, monkeypatch
        self.convert_pico = convert_pico

    @property
    def source(self):
        return self.copy(self.make_source("llama"), "source")

    @property
    def converted(self):
        return self.copy(self.convert_pico("llama", rank=10, rope_dim=6).out, "converted")

    def copy(self, folder, name):
        place = self.path / name
        return place if place.exists() else Path(shutil.copytree(folder, place))

    def small(self, *options):
        text = self.make_source("llama").parent / "text.txt"
        return ("--calib", text, "--eval", text, "--calib-samples", 8, "--calib-length", 32, "--eval-windows", 2,
                "--eval-length", 32, "--refine-steps", 0, "--device", "cpu", "--out", self.path / "out", "-q",
                *options)  # fmt: skip

    @property
    def text(self):
        return self.make_source("llama").parent / "text.txt"

    def heal(self, *options):
        other = ("--eval", "package:mla_demo/calibration.txt.gz") if "--eval" not in options else ()
        exact = self.copy(self.convert_pico("llama", rank="full", rope_dim="full").out, "exact")  # nothing to gain
        return ("heal", exact, "--teacher", self.source, "--data", self.text, "--tokens", "4k", "--length", 64,
                "--step-tokens", 512, "--eval-windows", 2, "--eval-length", 32, "--device", "cpu", "--out", self.path / "out",
                "-q", *other, *options)  # fmt: skip

    def json(self, file, **fields):
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    def fails_with(self, error):
        def broken(*_):
            raise error

        self.patch.setattr(mla_convert.pipeline.convert, "convert", broken)
        return (self.source, *self.small())

    def nan(self):
        file = self.source / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, file, {"format": "pt"})
        return (self.source, *self.small())

    def huge(self):
        file = self.source / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
        save_file(tensors, file, {"format": "pt"})
        return (self.source, *self.small())

    def tokenizer(self):
        (self.source / "tokenizer.json").write_text("{}")
        return (self.source, *self.small())

    def sizes(self):
        self.json(self.source / "config.json", num_hidden_layers=10**6)
        return ("plan", self.source)

    def unnamed_json(self):
        (self.path / "rows.txt").write_text('{"text": "one"}\n{"text": "two"}\n')
        return (self.source, *self.small("--calib", self.path / "rows.txt"))

    def truncated(self):
        file = self.source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return (self.source, *self.small())

    def changed(self):
        file = next(self.converted.glob("model-00002*"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        return ("verify", self.converted)

    def own_tokenizer(self):
        own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
        self.json(self.source / "config.json", model_type="smollm3")
        self.json(self.source / "tokenizer_config.json", **own)
        return (self.source, *self.small())

    def link(self):
        (self.path / "secret").write_text("x")
        (self.source / "LICENSE").symlink_to(self.path / "secret")
        return (self.source, *self.small())

    def others(self):
        (self.converted / "SHA256SUMS").unlink()
        (self.converted / "notes.txt").write_text("x")
        report = json.loads((self.converted / "report.json").read_text())
        report["versions"]["mla_convert"] = "0.1.0"
        (self.converted / "report.json").write_text(json.dumps(report))
        return ("refresh", self.converted)

    def family(self):
        self.json(self.source / "config.json", model_type="mamba")
        return (self.source, *self.small())

    def no_figure(self):
        report = json.loads((self.converted / "report.json").read_text())
        report["evaluation"]["ratio"] = None
        (self.converted / "report.json").write_text(json.dumps(report))
        return ("gate", self.converted, "--from-report", "--max-ppl-ratio", 2)

    def recipe(self):
        (self.path / "mine.yaml").write_text("description: d\nsource: x\nsettings:\n  rnak: 4\n")
        return (self.path / "mine.yaml",)

    def occupied(self):
        (self.path / "out").mkdir()
        (self.path / "out" / "thesis.txt").write_text("years of work")
        return (self.source, *self.small())

    def sweep(self):
        limit = ("--kv-ratios", 0.5, "--max-ppl-ratio", 0.5, "--folder", self.path / "sweep")
        return ("sweep", self.source, *self.small(*limit))

    def unfinished(self):
        (self.converted / "report.json").unlink()
        return self.push()

    def private(self):
        with open(self.converted / "README.md", "a") as card:
            card.write("/home/somebody/models")
        seal(self.converted)
        return self.push()

    def push(self, repo=REPO, *options):
        return ("push", self.converted, repo, "-q", *options)

    def no_token(self):
        self.patch.setenv("HF_TOKEN", "hf_wrong")
        return self.push()

    def conflict(self):
        self.hub.faults = [Fault("/commit/", 409)]
        return self.push()

    def broken_report(self):
        (self.converted / "report.json").write_text("{")
        return ("report", self.converted)

    def full_disk(self):
        self.patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        return (self.source, *self.small())

    def unreachable(self):
        self.patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        return self.push()

    def locked(self):
        self.lock = FileLock(self.path / ".out.lock")
        self.lock.acquire()
        return (self.source, *self.small())


CASES = {
    "an unexpected exception": lambda w: w.fails_with(ZeroDivisionError("division by zero")),
    "an option that does not exist": lambda w: (w.source, "--rnak", 4),
    "a value that an option cannot have": lambda w: (w.source, "--rank", "many"),
    "options that contradict each other": lambda w: (w.source, "--rank", 4, "--kv-ratio", 0.5),
    "a gate without a limit": lambda w: ("gate", w.converted, "--from-report"),
    "healing on the text that it is measured on": lambda world: world.heal("--eval", world.text),
    "healing, or a held-out text, without an evaluation": lambda w: (w.source, "--eval", "none", "--held-out", "calib"),
    "a repository name that the Hub cannot have": lambda w: w.push("no//name"),
    "a value outside its limit": lambda w: ("gate", w.converted, "--from-report", "--min-kv-saving", "99%", "--json"),
    "a value that is missing or NaN": lambda w: w.no_figure(),
    "a push whose gate fails": lambda w: w.push(REPO, "--from-report", "--min-kv-saving", "99%"),
    "a sweep without a point that is good enough": lambda w: w.sweep(),
    "a source that is not found": lambda w: ("nowhere", *w.small()),
    "a family that is not supported": lambda w: w.family(),
    "a model that is converted already": lambda w: (w.converted, *w.small()),
    "weights that are missing or damaged": lambda w: w.truncated(),
    "weights that are NaN or infinite": lambda w: w.nan(),
    "weights too large to compute with": lambda w: w.huge(),
    "sizes that no model has": lambda w: w.sizes(),
    "a tokenizer that is damaged": lambda w: w.tokenizer(),
    "a JSON text without the name of one": lambda w: w.unnamed_json(),
    "a home folder of an unknown user (~user)": lambda w: ("inspect", "~nosuchuser/model"),
    "a rank above full rank": lambda w: (w.source, *w.small("--rank", 4000)),
    "a share of the cache that is not above 0": lambda w: (w.source, *w.small("--kv-ratio", 0)),
    "a text that is not found or too short": lambda w: (w.source, *w.small("--eval", "nowhere.txt")),
    "a recipe with a key that no recipe has": lambda w: w.recipe(),
    "an output folder that holds something else": lambda w: w.occupied(),
    "a converted folder that was changed": lambda w: w.changed(),
    "a tokenizer with code of its own": lambda w: w.own_tokenizer(),
    "a source with a link that leads out of it": lambda w: w.link(),
    "a refresh of a folder with foreign files": lambda w: w.others(),
    "healing that gains nothing": lambda world: world.heal("--lr", 1, "--patience", 1),
    "a push of an unfinished conversion": lambda w: w.unfinished(),
    "a push of something private": lambda w: w.private(),
    "no token, or one that the Hub does not accept (401)": lambda w: w.no_token(),
    "a repository that the token may not write to (403)": lambda w: w.push("somebody/theirs"),
    "a repository that is not on the Hub (404)": lambda w: w.push("me/nothing", "--create-pr"),
    "a conflict on the Hub (409)": lambda w: w.conflict(),
    "a report that cannot be read": lambda w: w.broken_report(),
    "a disk that is too small": lambda w: w.full_disk(),
    "memory that does not suffice": lambda w: w.fails_with(MemoryError()),
    "a device that is not there": lambda w: (w.source, *w.small("--device", "cuda:99")),
    "a Hub that cannot be reached": lambda w: w.unreachable(),
    "a folder that another conversion is writing": lambda w: w.locked(),
    "Ctrl-C": lambda w: w.fails_with(KeyboardInterrupt()),
}


@pytest.fixture
def world(sources, convert_pico, hub, tmp_path, monkeypatch):
    return World(sources, convert_pico, hub, tmp_path, monkeypatch)


def test_the_table_and_these_cases_are_the_same():
    assert list(TABLE) == list(CASES)


def test_codes_are_those_of_the_help_and_of_the_errors():
    codes = {int(code) for code, _ in MEANINGS}
    assert codes == {int(code) for code in re.findall(r"\b(\d+) [a-z]", EXIT_CODES)} == {0, *TABLE.values()}
    classes = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MlaConvertError)
    ]
    assert {kind.exit_code for kind in classes} == codes - {0}


@pytest.mark.parametrize("error", TABLE)
def test_error(world, cli, error):
    arguments = CASES[error](world)
    code, out, err = cli(*arguments)
    assert code == TABLE[error], err
    assert err.count("\n") == 1 and err.startswith("mla-convert: ") and "Traceback" not in err, err
    if code != 3:  # a gate prints its table
        assert not out


def test_verbose_shows_where(world, cli):
    code, _, err = cli(*CASES["a rank above full rank"](world), "-v")
    assert code == 4 and "Traceback" in err and err.splitlines()[-1].startswith("mla-convert: rank 4000")
    code, _, err = cli(*CASES["an unexpected exception"](world), "-v")
    assert code == 1 and "ZeroDivisionError" in err and "-v" not in err.splitlines()[-1]
