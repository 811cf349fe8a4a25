"""Errors that a user can act on. Each is shown as one line and ends the command with its exit code."""


class MlaConvertError(Exception):
    """Base of all errors with a message for the user: what is wrong, where, what to do."""

    exit_code = 1


class UsageError(MlaConvertError):
    """Options that contradict each other or make no sense together."""

    exit_code = 2


class GateFailed(MlaConvertError):  # noqa: N818  (a verdict, not an error)
    """A measured figure is outside its limit, or could not be had."""

    exit_code = 3


class InputError(MlaConvertError):
    """A checkpoint, text, recipe or setting that cannot be used."""

    exit_code = 4


class ResourceError(MlaConvertError):
    """Disk, memory, device or network did not suffice."""

    exit_code = 5


class Interrupted(MlaConvertError):  # noqa: N818  (nothing went wrong)
    """Stopped by the user."""

    exit_code = 130


class ReaderGone(Exception):  # noqa: N818  (as when a pager is left)
    """Whoever read our output has closed it: nothing to say, and nobody to say it to."""

    exit_code = 141  # of a process that SIGPIPE ended


def one_line(error: BaseException) -> str:
    """An error's message as one line of at most 200 characters; of a key that is not there, that it is not there."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text += " is missing"
    return text if len(text) <= 200 else text[:197] + "..."
