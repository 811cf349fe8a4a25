"""Upload of a finished conversion to the Hugging Face Hub: its own files alone, checked first, in one commit."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from mla_convert.core import sums
from mla_convert.core.errors import InputError, UsageError, one_line
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import PAGE, REPORT, read_content, read_report
from mla_convert.modeling.shipped_code import CODE
from mla_convert.publish.hub_errors import hub_errors, with_retries
from mla_convert.source.carried import carried_files
from mla_convert.source.checkpoint.reader import INDEX
from mla_convert.source.licence import CARD
from mla_convert.write.verify import verify

# Files that every conversion writes; with the weights and the source's own files, nothing else is uploaded.
BESIDE = (CARD, REPORT, PAGE, INDEX, "config.json", *CODE, "recipe.yaml")
# A vocabulary may hold any words: in these files only the user's own token is looked for.
VOCABULARY = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "added_tokens.json")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
LOCAL_PATH = re.compile(r"(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)[\w.~-]+|\bfile://\S+")


@dataclass(frozen=True)
class Push:
    """The result of a push. `pull_request` is the page of the pull request, if one was asked for."""

    repo: str
    revision: str
    commit: str
    url: str
    private: bool
    files: list[str]
    deleted: list[str]
    pull_request: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `push --json`."""
        return asdict(self)


@dataclass(frozen=True)
class Destination:
    """The place on the Hub that a push writes to.

    `private`: whether the repository must be private (None: as it is, or as the Hub makes it); `revision`: a branch, made if
    it does not exist; `create_pr`: open a pull request instead of committing.
    """

    repo: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False


@dataclass(frozen=True)
class Upload:
    """The content of a commit: name -> local file, or bytes that replace it. `size`: bytes of the local files."""

    contents: dict[str, Path | bytes]
    message: str
    size: int

    @classmethod
    def of(cls, folder: Path, files: list[str], repo: str, message: str | None) -> Upload:
        """Files of a conversion, with the repository's name in the model card and the checksum of that card."""
        # The card alone changes on its way, so its line in SHA256SUMS is the only one that has to.
        card = card_for(folder, repo)
        contents: dict[str, Path | bytes] = {**{file: folder / file for file in files}, CARD: card}
        if sums.SUMS in files:
            stated = {**sums.read(folder), CARD: hashlib.sha256(card).hexdigest()}
            contents[sums.SUMS] = sums.text(stated).encode()
        size = sum((folder / file).stat().st_size for file in files)
        return cls(contents, message or commit_message(folder), size)


def push(
    folder: Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    progress: Progress | None = None,
) -> Push:
    """Upload a finished conversion to the model repository `repo` in one commit; make the repository if it does not exist.

    Every byte is verified first, and no file may hold a token, a user name or a path of this machine. The same commit deletes
    weights in the repository that this conversion does not have.

    Args:
        folder: a converted or healed folder.
        repo: owner/name.
        private: make a new repository private; refuse a public one that exists.
        revision: a branch, made if it does not exist.
        create_pr: open a pull request instead of committing.
        message: of the commit; made from the report if not given.
        progress: for notes.

    Raises:
        UsageError: a repository name that the Hub cannot have.
        InputError: no finished conversion, something private in it, or the Hub's refusal (401, 403, 404, 409).
        ResourceError: the Hub cannot be reached or does not answer.
    """
    progress = progress or Progress()
    destination = Destination(repo, private, revision, create_pr)
    # Everything that can be refused without the Hub is refused before the first request.
    files = preflight(folder, repo, progress)
    upload = Upload.of(folder, files, repo, message)
    with hub_errors(repo), _bars(progress):
        is_private = open_repository(destination)
        stale = stale_weights(destination, upload)
        progress.note(f"uploading {len(upload.contents)} files, {upload.size / 1e9:.2f} GB, to {repo}")
        done = commit(destination, upload, stale)
    url = f"{HfApi().endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")
    return Push(
        repo=repo,
        revision=str(done.pr_revision) if create_pr else revision or "main",
        commit=done.oid,
        url=str(done.pr_url) if create_pr else url,
        private=is_private,
        files=sorted(upload.contents),
        deleted=stale,
        pull_request=done.pr_url if create_pr else None,
    )


def preflight(folder: Path, repo: str, progress: Progress) -> list[str]:
    """Check a folder before anything is sent. Returns the names of the files to upload.

    Raises:
        UsageError: a repository name that the Hub cannot have.
        InputError: no finished conversion, or something private in it.
    """
    check_name(repo)
    progress.note(f"checking {folder}")
    if note := verify(folder).note:
        progress.note(note)
    files = belonging(folder)
    # After `verify`: what is searched is then what is uploaded.
    check_private(folder, files)
    return files


def open_repository(destination: Destination) -> bool:
    """Make the repository and its branch if they do not exist. Returns whether the repository is private.

    Raises:
        InputError: it is public and must be private.
    """
    api, repo = HfApi(), destination.repo
    if not destination.create_pr:  # a pull request goes to a repository that exists, usually somebody else's
        with_retries(lambda: api.create_repo(repo, private=destination.private, exist_ok=True))
    # Asked for, because `create_repo` changes nothing about a repository that exists.
    is_private = bool(with_retries(lambda: api.repo_info(repo)).private)
    if destination.private and not is_private:
        raise InputError(f"{repo} is there already and public: make it private on the Hub, or leave out --private")
    revision = destination.revision
    if revision and not destination.create_pr:
        with_retries(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    return is_private


def stale_weights(destination: Destination, upload: Upload) -> list[str]:
    """Weights in the repository that an earlier conversion left there."""
    files = with_retries(lambda: HfApi().list_repo_files(destination.repo, revision=destination.revision))
    # A conversion writes its shards beside its configuration; weights in folders are the owner's own.
    return sorted(
        file for file in files if file.endswith(".safetensors") and "/" not in file and file not in upload.contents
    )


def commit(destination: Destination, upload: Upload, stale: list[str]) -> CommitInfo:
    """Add the upload's files and delete the stale ones in one commit."""

    def send() -> CommitInfo:
        # new operations for each attempt: one that reached the Hub cannot be used again
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(file, content) for file, content in upload.contents.items()),
            *(CommitOperationDelete(file) for file in stale),
        ]
        return HfApi().create_commit(
            destination.repo,
            operations,
            commit_message=upload.message,
            revision=destination.revision,
            create_pr=destination.create_pr,
        )

    # The Hub recognises a repeated commit; a repeated pull request would be a second one.
    return send() if destination.create_pr else with_retries(send)


def check_access(repo: str) -> None:
    """Refuse a push that cannot succeed, before the conversion that it would upload.

    Raises:
        UsageError, InputError, ResourceError: as `push`.
    """
    check_name(repo)
    with hub_errors(repo):
        with_retries(lambda: HfApi().whoami())


def check_name(repo: str) -> None:
    """Refuse a name that no repository can have."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no repository name: give owner/name ({one_line(error)})") from error
    if "/" not in repo:
        raise UsageError(f"{repo!r} does not say whose it is: give owner/name")


def belonging(folder: Path) -> list[str]:
    """Names of the files of a conversion: those in SHA256SUMS, or, in a folder of version 0.1, those that it wrote.

    Raises:
        InputError: a file that every conversion has is missing.
    """
    for file in BESIDE:
        if file != PAGE and not (folder / file).is_file():  # folders of the first version have no page
            raise InputError(f"{folder} has no {file}: not a finished conversion")
    if (folder / sums.SUMS).is_file():
        return sorted({*sums.read(folder), sums.SUMS})
    shards = read_content(folder)["checksums"]
    carried = {path.name for path in carried_files(folder)}
    return sorted({*shards, *carried, *(file for file in BESIDE if (folder / file).is_file())})


def check_private(folder: Path, files: list[str]) -> None:
    """Refuse to publish private data: tokens, paths of this machine, the user's name.

    Raises:
        InputError: names the file and the text that it holds (not a token's).
    """
    token = get_token()
    # a short path such as /tmp may occur in any text
    here = {str(path) for path in (folder.resolve(), Path.home(), Path.cwd()) if len(path.parts) > 2}
    name = _user()
    user = re.compile(rf"[/\\]{re.escape(name)}[/\\]") if name else None
    for file in files:
        text = _text(folder / file)
        if token and token in text:
            raise InputError(f"{file} holds your Hub token: remove it, and revoke the token if it was ever published")
        if any(Path(file).match(pattern) for pattern in VOCABULARY):
            continue
        # The longest first, so that the message shows the whole path.
        for path in sorted(here, key=len, reverse=True):
            if path in text:
                raise InputError(f"{file} holds a local path ({path}): remove it before publishing")
        if TOKEN.search(text):
            raise InputError(f"{file} holds a Hub token: remove it before publishing")
        # the source's own files are public already, and a chat template may mention any home folder
        if file in BESIDE and (match := LOCAL_PATH.search(text)):
            raise InputError(f"{file} holds a local path ({match[0]}): remove it before publishing")
        if user and (match := user.search(text)):
            raise InputError(f"{file} holds your user name in a path ({match[0]}): remove it before publishing")


def _user() -> str | None:
    """The user's name, if it is longer than two letters, which other words might contain."""
    with contextlib.suppress(OSError, KeyError):
        name = getpass.getuser()
        return name if len(name) > 2 else None
    return None


def _text(path: Path) -> str:
    """A file's text; of a shard only the header, which holds names and metadata."""
    if path.suffix != ".safetensors":
        return path.read_bytes().decode("utf-8", errors="replace")
    with open(path, "rb") as shard:
        return shard.read(int.from_bytes(shard.read(8), "little")).decode("utf-8", errors="replace")


def card_for(folder: Path, repo: str) -> bytes:
    """The model card with the repository's name where it shows how to load the model."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except ValueError as error:
        raise InputError(f"{CARD} in {folder} is not UTF-8: it is damaged") from error
    return text.replace('from_pretrained("."', f'from_pretrained("{repo}"').encode()


def commit_message(folder: Path) -> str:
    """The default message of the commit, from the report."""
    report = read_report(folder)
    sizes = f"rank {report.cache.kv_lora_rank} + {report.cache.qk_rope_head_dim} rotary"
    return f"{report.source.name} with Multi-head Latent Attention, {sizes}"


@contextlib.contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    """Hide huggingface_hub's progress bars unless the output is a terminal."""
    hide = (progress.quiet or not progress.console.is_terminal) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
