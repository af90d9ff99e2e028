"""The errors Ostro raises on purpose, and the exit code each one means.

Every message begins with the dotted recipe key, the file (and row) or the name it is about, then says the value seen,
what was expected and what to do. Programming errors are left to Python's own exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable

_MAX_LISTED = 10


class OstroError(Exception):
    """Base of every error a user can cause or mend; the command line prints it as one line."""

    exit_code: int = 1


class RecipeError(OstroError):
    """A recipe, override or option that cannot be used; the message begins with its dotted key."""

    exit_code = 2


class DataError(OstroError):
    """A data file or row that cannot be used; the message begins with the file and the row."""


class LayoutError(OstroError):
    """A weights folder whose files, keys or configuration are not what was asked for."""


class CheckpointError(OstroError):
    """Weights or train state that cannot be read or written."""


class ToldElsewhere(OstroError):
    """Another rank failed and tells why; this one ends without a word."""


def missing_extra(extra: str, package: str) -> OstroError:
    """The error for a feature whose optional package is not installed.

    Args:
        extra: Name of the extra in `pyproject.toml`, such as `eval`.
        package: Distribution that could not be imported, such as `ir-measures`.

    Returns:
        An error to raise, naming the install command.
    """
    return OstroError(f"{package}: not installed; run: pip install 'ostro[{extra}]'")


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing.

    Args:
        error: Any error.
    """
    return (str(error) or type(error).__name__).partition("\n")[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a device or of the host.

    Args:
        error: Any error.
    """
    import torch  # here, as the command names its options without it

    # torch has no class for the host's: DefaultCPUAllocator raises a RuntimeError
    is_of_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_of_host or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def shorten(keys: Iterable[str]) -> str:
    """Up to ten keys, sorted, and how many more there are, for a message.

    Args:
        keys: Any number of keys.
    """
    ordered = sorted(keys)
    more = f" and {len(ordered) - _MAX_LISTED} more" if len(ordered) > _MAX_LISTED else ""
    return ", ".join(ordered[:_MAX_LISTED]) + more
