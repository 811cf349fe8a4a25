"""Errors that a user can act on. Each is printed as one line and ends the command with its exit code."""


class MlaConvertError(Exception):
    """Base of all errors with a message for the user, which names the problem, its place and a remedy."""

    exit_code = 1


class UsageError(MlaConvertError):
    """Options that contradict each other or make no sense together."""

    exit_code = 2


class GateFailed(MlaConvertError):  # noqa: N818  (a verdict, not an error)
    """A measured value is outside its limit, or could not be measured."""

    exit_code = 3


class InputError(MlaConvertError):
    """A checkpoint, text, recipe or setting that cannot be used."""

    exit_code = 4


class ResourceError(MlaConvertError):
    """Disk, memory, device or network was not sufficient."""

    exit_code = 5


class PeerLost(ResourceError):  # noqa: N818  (the error is the other process's)
    """Another process of this run ended, and with it the exchange that this one waited for."""


class Interrupted(MlaConvertError):  # noqa: N818  (nothing went wrong)
    """Stopped by the user."""

    exit_code = 130


class ReaderGone(Exception):  # noqa: N818  (as when a pager is left)
    """The reader of our output has closed it. Nothing is printed."""

    exit_code = 141  # as of a process that SIGPIPE ended


def one_line(error: BaseException) -> str:
    """An error's message as one line of at most 200 characters; of a KeyError, that the key is missing."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text += " is missing"
    return text if len(text) <= 200 else text[:197] + "..."
