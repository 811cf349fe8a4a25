"""The Hub's refusals and failures as the package's errors, one line each; and requests that are tried again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from mla_convert.core.errors import InputError, MlaConvertError, ResourceError, one_line

# Attempts of a request that the connection made fail; seconds before the second one, doubled each time.
TRIES, WAIT = 4, 1.0
# Packages of the HTTP clients that huggingface_hub has used; their errors share no base class.
HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
Answer = TypeVar("Answer")


def with_retries(request: Callable[[], Answer]) -> Answer:
    """Call `request`, again after a growing pause if the connection broke or the Hub was busy.

    Args:
        request: a call that may be repeated after the Hub has answered it.
    """
    for attempt in range(TRIES - 1):
        try:
            return request()
        except Exception as error:
            if not is_temporary(error):
                raise
            time.sleep(WAIT * 2**attempt)
    return request()


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error: huggingface_hub wraps the errors of large files in others."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return getattr(error.response, "status_code", None)
        error = error.__cause__
    return None


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an error comes from the connection and not from the Hub's answer."""
    while error is not None:
        if type(error).__module__.partition(".")[0] in HTTP_CLIENTS:
            return not isinstance(error, HfHubHTTPError)
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        error = error.__cause__
    return False


def is_temporary(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = http_status(error)
    return status in (429, 500, 502, 503, 504) if status else is_connection_error(error)


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Convert every error of huggingface_hub into one with a message of one line and an exit code.

    Raises:
        InputError: the Hub refuses the request, the token or the content.
        ResourceError: the Hub cannot be reached, does not answer, or has no room.
    """
    try:
        yield
    except MlaConvertError:
        raise
    except OfflineModeIsEnabled as error:
        raise ResourceError(f"the Hub cannot be reached for {repo}: offline mode is set (HF_HUB_OFFLINE)") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"no Hub token for {repo}: log in with `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:
        status = http_status(error)
        if status is not None or is_connection_error(error):
            raise _refusal(repo, status, error) from error
        if isinstance(error, RuntimeError):  # huggingface_hub's failed upload of a large file
            raise ResourceError(f"the upload to {repo} failed: {one_line(_innermost(error))}") from error
        if isinstance(error, ValueError):  # metadata of the card, before anything is uploaded
            raise InputError(f"the Hub does not take this for {repo}: {one_line(error)}") from error
        raise


def _refusal(repo: str, status: int | None, error: Exception) -> MlaConvertError:
    answer = one_line(_server_words(error))
    if status is None:
        return ResourceError(f"the Hub cannot be reached for {repo}: {answer}")
    messages = {
        401: f"the Hub does not accept the token for {repo} (401): log in with `hf auth login`, or set HF_TOKEN",
        403: f"the token may not write to {repo} (403): give it the right to write there, or use --create-pr",
        404: f"{repo} is not on the Hub, or not visible with this token (404)",
        409: f"the Hub reports a conflict for {repo} (409), somebody may be writing to it: {answer}",
    }
    if status in messages:
        return InputError(messages[status])
    kind = ResourceError if status >= 500 or status in (402, 408, 413, 429, 507) else InputError
    return kind(f"the Hub refuses {repo} ({status}): {answer}")


def _server_words(error: BaseException) -> BaseException:
    """The server's message, or the innermost error."""
    inner = _innermost(error)
    if isinstance(inner, HfHubHTTPError) and inner.server_message:
        return RuntimeError(inner.server_message)
    return inner


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error
