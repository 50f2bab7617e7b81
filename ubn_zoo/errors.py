"""All errors that the package raises deliberately, with one base class.

Each error also derives from the matching built-in error (`ValueError`, `LookupError`, ...), so either can be caught.
The message names what was received, what is valid, and how to fix it.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BundleError",
    "CheckpointError",
    "ChecksumError",
    "ClassMismatchError",
    "DataError",
    "EvaluationError",
    "HubAccessError",
    "HubError",
    "HubNotFoundError",
    "HubUnavailableError",
    "InvalidArgumentError",
    "ManifestError",
    "MissingPackageError",
    "NotRecordedError",
    "PublishConflictError",
    "PublishError",
    "QuickstartError",
    "RanksError",
    "RecipeError",
    "RunError",
    "SnapshotError",
    "TrainingError",
    "UbnZooError",
    "UnknownModelError",
    "UnsafeFileError",
]


class UbnZooError(Exception):
    """Base class of this package's errors."""


class InvalidArgumentError(UbnZooError, ValueError):
    """An argument is not valid; the message names it, the value received, and what is valid."""


class MissingPackageError(UbnZooError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class RanksError(UbnZooError, RuntimeError):
    """The environment does not define a valid process group, or the group cannot be formed; the message has the fix."""


class HubError(UbnZooError, RuntimeError):
    """A request to the Hub failed; the message says why and what to do."""


class HubUnavailableError(HubError):
    """The Hub is unreachable or keeps failing, and the file is not in the cache."""


class HubNotFoundError(HubError):
    """The repository, the revision or the file does not exist."""


class HubAccessError(HubError):
    """The repository is gated, private or disabled, or the token is not valid."""


class UnsafeFileError(HubError, ValueError):
    """Loading the file could run code, or its name could leave the cache folder."""


class ChecksumError(HubError):
    """A file's hash or size differs from the expected one."""


class PublishConflictError(HubError):
    """The repository holds another model, or files that this publication would overwrite; nothing was changed."""


class ManifestError(UbnZooError, ValueError):
    """A manifest is not valid; the message names the record, the field, the value received and what is valid."""


class NotRecordedError(ManifestError):
    """A checkpoint was published, but the manifest could not be written; the message says what to run."""


class RecipeError(UbnZooError, ValueError):
    """A recipe is not valid; the message names the key, the value received and what is valid."""


class UnknownModelError(UbnZooError, LookupError):
    """The zoo does not have the model or weights; the message lists similar names."""


class CheckpointError(UbnZooError, RuntimeError):
    """Weights cannot be read or do not fit the model; the message names the file, the keys and both shapes."""


class DataError(UbnZooError, ValueError):
    """Data cannot be used; the message names the file or folder and the fix."""

    def __init__(self, message: str) -> None:
        # A loader worker forwards its error as text that starts with the traceback.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class ClassMismatchError(DataError):
    """Data and model name their classes differently; the message shows both names and how to override the check."""


class EvaluationError(UbnZooError, ValueError):
    """The model, weights, images or results file do not match; the message says what was received and what is valid."""


class TrainingError(UbnZooError, RuntimeError):
    """Training cannot start or continue; the message says why and what to change."""


class SnapshotError(UbnZooError, ValueError):
    """A snapshot is incomplete, or was changed after it was written; the message names the file."""


class RunError(UbnZooError, RuntimeError):
    """A run cannot start or continue; the message says why, which files are kept, and what to do."""


class QuickstartError(UbnZooError, RuntimeError):
    """The quickstart cannot run, or its saved model cannot be reloaded; the message says what to do."""


class BundleError(UbnZooError, ValueError):
    """A run cannot be bundled with the package; the message says why."""


class PublishError(UbnZooError, ValueError):
    """A checkpoint does not meet the requirements for publication.

    Attributes:
        reasons: All reasons, which the message lists too.
    """

    def __init__(self, source: str, reasons: Sequence[str]) -> None:
        super().__init__(f"{source} cannot be published: " + "; ".join(reasons))
        self.reasons = tuple(reasons)
