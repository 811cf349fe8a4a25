"""Errors that a user can act on. Each is shown as one line and ends the command with its exit code."""


class MlaConvertError(Exception):
    """Base of all errors with a message for the user: what is wrong, where, what to do."""

    exit_code = 1


class UsageError(MlaConvertError):
    """Options that contradict each other or make no sense together."""

    exit_code = 2


class InputError(MlaConvertError):
    """A checkpoint, text, recipe or setting that cannot be used."""

    exit_code = 4


class ResourceError(MlaConvertError):
    """Disk, memory, device or network did not suffice."""

    exit_code = 5


class Interrupted(MlaConvertError):  # noqa: N818  (nothing went wrong)
    """Stopped by the user."""

    exit_code = 130
