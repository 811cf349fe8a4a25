"""Puts a finished conversion on the Hugging Face Hub: what belongs there, checked first, in one commit."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from mla_convert.core import sums
from mla_convert.core.errors import InputError, MlaConvertError, ResourceError, UsageError, one_line
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import PAGE, REPORT, read_content, read_report
from mla_convert.modeling.shipped_code import CODE
from mla_convert.source.carried import carried_files
from mla_convert.source.checkpoint.reader import INDEX
from mla_convert.source.licence import CARD
from mla_convert.write.verify import verify

# What a conversion writes beside the weights and what it carries over; nothing else in the folder is uploaded.
BESIDE = (CARD, REPORT, PAGE, INDEX, "config.json", *CODE, "recipe.yaml")
# A vocabulary may hold any words: there only what is surely private counts.
VOCABULARY = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "added_tokens.json")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
LOCAL_PATH = re.compile(r"(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)[\w.~-]+|\bfile://\S+")
TRIES, WAIT = 4, 1.0  # of a request that the connection, not the Hub, made fail; seconds, doubled each time


@dataclass(frozen=True)
class Push:
    """What stands on the Hub after a push. `pull_request` is its page, if one was asked for."""

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
    """Upload a finished conversion to the model repository `repo` in one commit, and make the repository if need be.

    Every byte is checked first (`verify`), then that no token, user name or path of this machine is among them. Weights
    that an earlier conversion left in the repository and this one does not have are deleted in the same commit.
    `revision` is a branch, made if it is not there. With `create_pr` the commit becomes a pull request.

    Raises:
        UsageError: a repository name that the Hub cannot have.
        InputError: no finished conversion, something private in it, or the Hub's refusal (401, 403, 404, 409).
        ResourceError: the Hub cannot be reached or does not answer.
    """
    progress = progress or Progress()
    check_name(repo)
    progress.note(f"checking {folder}")
    if note := verify(folder).note:
        progress.note(note)
    files = belonging(folder)
    check_private(folder, files)
    contents: dict[str, Path | bytes] = {file: folder / file for file in files}
    contents[CARD] = card_for(folder, repo)
    if sums.SUMS in files:  # of what is uploaded, the card as it is there
        stated = {**sums.read(folder), CARD: hashlib.sha256(contents[CARD]).hexdigest()}
        contents[sums.SUMS] = sums.text(stated).encode()

    api = HfApi()
    with _hub_errors(repo), _bars(progress):
        if create_pr:  # to somebody else's repository, as a rule: it is there already
            _again(lambda: api.repo_info(repo))
        else:
            _again(lambda: api.create_repo(repo, private=private, exist_ok=True))
        found = _again(lambda: api.repo_info(repo))
        if private and not found.private:
            raise InputError(f"{repo} is there already and public: make it private on the Hub, or leave out --private")
        if revision and not create_pr:
            _again(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        stale = sorted(
            file
            for file in _again(lambda: api.list_repo_files(repo, revision=revision))
            if file.endswith(".safetensors") and "/" not in file and file not in contents
        )
        size = sum((folder / file).stat().st_size for file in files)
        progress.note(f"uploading {len(contents)} files, {size / 1e9:.2f} GB, to {repo}")

        def commit() -> Any:
            # made anew each time: an operation that reached the Hub cannot be used again
            operations = [
                *(CommitOperationAdd(file, content) for file, content in contents.items()),
                *(CommitOperationDelete(file) for file in stale),
            ]
            return api.create_commit(
                repo,
                operations,
                commit_message=message or commit_message(folder),
                revision=revision,
                create_pr=create_pr,
            )

        # a commit whose answer is lost is found out to be there already; a pull request would be opened twice
        done = commit() if create_pr else _again(commit)
    return Push(
        repo=repo,
        revision=done.pr_revision if create_pr else revision or "main",
        commit=done.oid,
        url=done.pr_url if create_pr else f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else ""),
        private=bool(found.private),
        files=sorted(contents),
        deleted=stale,
        pull_request=done.pr_url if create_pr else None,
    )


def check_access(repo: str) -> None:
    """Refuse a push that cannot succeed before hours of work are spent on what it would upload.

    Raises:
        UsageError, InputError, ResourceError: as `push`.
    """
    check_name(repo)
    with _hub_errors(repo):
        _again(lambda: HfApi().whoami())


def check_name(repo: str) -> None:
    """Refuse a name that no repository can have."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no repository name: give owner/name ({one_line(error)})") from error
    if "/" not in repo:
        raise UsageError(f"{repo!r} does not say whose it is: give owner/name")


def belonging(folder: Path) -> list[str]:
    """Names of the files of a conversion: all that SHA256SUMS lists; in an earlier version's folder, what it wrote.

    Raises:
        InputError: one that every conversion has is missing.
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
    """Refuse to publish what is nobody's business: tokens, paths of this machine, its user's name.

    Raises:
        InputError: with the file and what it holds (a token is not repeated).
    """
    token = get_token()
    # a path of one part, such as /tmp, may stand in any text
    here = {str(path) for path in (folder.resolve(), Path.home(), Path.cwd()) if len(path.parts) > 2}
    name = _user()
    user = re.compile(rf"[/\\]{re.escape(name)}[/\\]") if name else None
    for file in files:
        text = _text(folder / file)
        if token and token in text:
            raise InputError(f"{file} holds your Hub token: remove it, and revoke the token if it was ever published")
        if any(Path(file).match(pattern) for pattern in VOCABULARY):
            continue
        for path in sorted(here, key=len, reverse=True):
            if path in text:
                raise InputError(f"{file} holds a local path ({path}): remove it before publishing")
        if TOKEN.search(text):
            raise InputError(f"{file} holds a Hub token: remove it before publishing")
        # files of the source's are public already, and a chat template may speak of anybody's home
        if file in BESIDE and (match := LOCAL_PATH.search(text)):
            raise InputError(f"{file} holds a local path ({match[0]}): remove it before publishing")
        if user and (match := user.search(text)):
            raise InputError(f"{file} holds your user name in a path ({match[0]}): remove it before publishing")


def _user() -> str | None:
    """The user's name, if it is long enough to be told from other words."""
    with contextlib.suppress(OSError, KeyError):
        name = getpass.getuser()
        return name if len(name) > 2 else None
    return None


def _text(path: Path) -> str:
    """A file's text; of a shard its header, where names and metadata are."""
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
    """What the commit says where nothing was given."""
    report = read_report(folder)
    sizes = f"rank {report.cache.kv_lora_rank} + {report.cache.qk_rope_head_dim} rotary"
    return f"{report.source.name} with Multi-head Latent Attention, {sizes}"


@contextlib.contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    """The library's own bars only where somebody watches."""
    hide = (progress.quiet or not progress.console.is_terminal) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _again(request: Any) -> Any:
    """Ask again, with a growing pause, when the connection broke or the Hub was busy."""
    for attempt in range(TRIES):
        try:
            return request()
        except Exception as error:
            if attempt == TRIES - 1 or not _passing(error):
                raise
            time.sleep(WAIT * 2**attempt)
    raise AssertionError


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error; the library wraps those of large files in others."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return getattr(error.response, "status_code", None)
        error = error.__cause__
    return None


def _of_connection(error: BaseException | None) -> bool:
    # by module and not by class: huggingface_hub has changed its HTTP library more than once
    while error is not None:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            return not isinstance(error, HfHubHTTPError)
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        error = error.__cause__
    return False


def _passing(error: BaseException) -> bool:
    status = _status(error)
    return status in (429, 500, 502, 503, 504) if status else _of_connection(error)


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Every way in which the Hub can refuse, in one line and with its exit code."""
    try:
        yield
    except MlaConvertError:
        raise
    except OfflineModeIsEnabled as error:
        raise ResourceError(f"the Hub cannot be reached for {repo}: offline mode is set (HF_HUB_OFFLINE)") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"no Hub token for {repo}: log in with `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:
        status = _status(error)
        if status is not None or _of_connection(error):
            raise _refusal(repo, status, error) from error
        if isinstance(error, RuntimeError):  # what the library's upload of large files fails with
            raise ResourceError(f"the upload to {repo} failed: {one_line(_innermost(error))}") from error
        if isinstance(error, ValueError):  # metadata of the card, before anything is uploaded
            raise InputError(f"the Hub does not take this for {repo}: {one_line(error)}") from error
        raise


def _refusal(repo: str, status: int | None, error: Exception) -> MlaConvertError:
    said = one_line(_server_words(error))
    if status is None:
        return ResourceError(f"the Hub cannot be reached for {repo}: {said}")
    words = {
        401: f"the Hub does not accept the token for {repo} (401): log in with `hf auth login`, or set HF_TOKEN",
        403: f"the token may not write to {repo} (403): give it the right to write there, or use --create-pr",
        404: f"{repo} is not on the Hub, or not visible with this token (404)",
        409: f"the Hub reports a conflict for {repo} (409), somebody may be writing to it: {said}",
    }
    if status in words:
        return InputError(words[status])
    kind = ResourceError if status >= 500 or status in (402, 408, 413, 429, 507) else InputError
    return kind(f"the Hub refuses {repo} ({status}): {said}")


def _server_words(error: BaseException) -> BaseException:
    """What the server said, or the innermost error."""
    inner = _innermost(error)
    if isinstance(inner, HfHubHTTPError) and inner.server_message:
        return RuntimeError(inner.server_message)
    return inner


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error
