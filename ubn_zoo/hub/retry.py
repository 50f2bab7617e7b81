"""Requests to the Hub: retries with growing pauses, and huggingface_hub's errors in terms that users can act on.

Downloads and uploads share this module. After a temporary error the request is repeated until time runs out; any other
error is raised at once as a `HubError` whose message says what to do. Messages never contain credentials.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import constants, errors, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ubn_zoo.errors import HubAccessError, HubError, HubNotFoundError, HubUnavailableError, InvalidArgumentError

__all__ = [
    "RETRY_SECONDS",
    "RETRY_SECONDS_VARIABLE",
    "TEMPORARY_STATUS",
    "Advice",
    "Backoff",
    "HTTPError",
    "describe_failure",
    "endpoint",
    "redact",
    "retry",
    "traceable",
]

RETRY_SECONDS = 60.0
"""No new attempt starts later than this after the first failure; a running attempt is not interrupted."""

RETRY_SECONDS_VARIABLE = "UBN_ZOO_RETRY_SECONDS"
"""Environment variable that overrides `RETRY_SECONDS`; 0 means a single attempt."""

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 16.0
"""Seconds between attempts: the first pause, doubled each time up to the longest."""

TEMPORARY_STATUS = (408, 425, 429)
"""HTTP statuses below 500 that are retried, in addition to all 5xx."""

# The base class of the HTTP library's errors (httpx or httpx2), which huggingface_hub derives its own from.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
_Response: type[Any] = vars(errors)["Response"]

_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s'\"]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^?\s'\"]*)\?[^\s'\"]*")
# hf_xet reports an HTTP status only in the text of its errors.
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
_XET_TOKEN = re.compile(r"/xet-(read|write)-token/")
_WITHOUT_XET = "Set HF_HUB_DISABLE_XET=1 to transfer files without Xet, which some servers and mirrors lack"
_SHOWN = 200  # characters of a response or another library's message that an error quotes

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """What to tell the user when a request fails permanently.

    Attributes:
        login: How to get access.
        offline: What to do in offline mode.
        exhausted: What to do after the last attempt.
        writing: Whether the request writes: HTTP 401 then means a bad token, not a missing repository.
    """

    login: str
    offline: str
    exhausted: str
    writing: bool = False


def redact(text: str) -> str:
    """Remove credentials from a text: the token, and the user, password and query (a signature) of URLs."""
    text, token = _QUERY.sub(r"\1", _USER.sub(r"\1", text)), get_token()
    return text.replace(token, "***") if token else text


def endpoint() -> str:
    """The Hub's address (``HF_ENDPOINT``) without any user name or password in it."""
    address = constants.ENDPOINT
    return redact(address) if "://" in address else address.rpartition("@")[2]


class _Redaction(logging.Filter):
    """Removes credentials from what huggingface_hub logs about its own retries."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if redact(message) != message:
            record.msg, record.args = redact(message), ()
        return True


for _name in ("huggingface_hub.file_download", "huggingface_hub.utils._http"):
    logging.getLogger(_name).addFilter(_Redaction())


def retry(attempt: Callable[[], _T], subject: str, advice: Advice) -> _T:
    """Call a function until it succeeds, fails permanently, or has kept failing for `RETRY_SECONDS` seconds.

    Args:
        attempt: Makes requests to the Hub.
        subject: What the requests are about; every message starts with it.
        advice: What to tell the user when the requests fail.

    Raises:
        HubError: The attempts failed.
        OSError: The file system failed.
        ValueError: An argument of the request is not valid.
    """
    backoff = Backoff(subject, advice)
    while True:
        try:
            return attempt()
        except Exception as error:
            backoff.wait(error)


class Backoff:
    """Growing pauses between attempts, until they have kept failing for `RETRY_SECONDS` seconds.

    Args:
        subject: What the requests are about; every message starts with it.
        advice: What to tell the user when the requests fail.

    Raises:
        ValueError: The environment variable `RETRY_SECONDS_VARIABLE` is not a number of seconds.
    """

    def __init__(self, subject: str, advice: Advice) -> None:
        self._subject, self._advice = subject, advice
        self._limit, self._pause = _retry_seconds(), FIRST_PAUSE
        self._deadline: float | None = None

    def wait(self, error: Exception) -> None:
        """Pause and return if another attempt may succeed; otherwise raise what the error means.

        Args:
            error: Why the last attempt failed.

        Raises:
            HubError: The error is permanent, or time has run out.
            OSError: `error` itself, if the file system failed.
            ValueError: `error` itself, if an argument of the request is not valid.
        """
        _raise_if_permanent(error, self._subject, self._advice)
        reason, now = describe_failure(error), time.monotonic()
        self._deadline = now + self._limit if self._deadline is None else self._deadline
        if now + self._pause > self._deadline:
            raise HubUnavailableError(
                f"{self._subject}: {reason}; gave up after retrying for {self._limit:g} s. {self._advice.exhausted}"
            ) from traceable(error)
        _logger.warning("%s: %s; trying again in %g s", self._subject, reason, self._pause)
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def _retry_seconds() -> float:
    value = os.environ.get(RETRY_SECONDS_VARIABLE)
    if value is None:
        return RETRY_SECONDS
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise InvalidArgumentError(
            f"{RETRY_SECONDS_VARIABLE}: received {value!r}; valid: a number of seconds, 0 or more"
        )
    return seconds


def _raise_if_permanent(error: Exception, subject: str, advice: Advice) -> None:
    """Return if repeating the request may help; otherwise raise what the error means, or the error itself."""
    if isinstance(error, HubError):
        raise error
    error = _root(error)
    found = _permanent(error, advice)
    if found is not None:
        kind, message = found
        raise kind(f"{subject}: {message}") from (None if isinstance(error, UnicodeError) else traceable(error))


def _permanent(error: Exception, advice: Advice) -> tuple[type[HubError], str] | None:
    """The class and message of what a permanent error means; None if repeating the request may help.

    Raises:
        Exception: `error` itself, if the Hub is not the cause: the file system, an argument, a bug in this package.
    """
    xet = _XET_STATUS.search(str(error)) if isinstance(error, (OSError, RuntimeError)) else None
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnavailableError, f"offline mode is on. {advice.offline}"
    if isinstance(error, FileMetadataError):
        return HubError, f"{endpoint()} does not respond like a Hub; check HF_ENDPOINT"
    if isinstance(error, HfHubHTTPError):
        return _permanent_response(error, advice)
    if xet is not None:
        return _permanent_status(
            int(xet[1]),
            f"the Hub denied access to its Xet storage (HTTP {xet[1]}); {advice.login}",
            f"the Xet transfer failed ({describe_failure(error)}). {_WITHOUT_XET}",
        )
    if type(error).__name__ == "UnsupportedProtocol":
        valid = "http:// or https://"
        if not constants.ENDPOINT.startswith(("http://", "https://")):
            return HubError, f"HF_ENDPOINT is {endpoint()!r}; valid: {valid}"
        where = f"{endpoint()} redirects to an address that is not {valid}, which is not followed"
        return HubError, f"{where}; check HF_ENDPOINT and proxies"
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":
        wrong = "the token contains non-ASCII characters and was probably copied incorrectly"
        return HubAccessError, f"{wrong}; {advice.login}"
    if isinstance(error, (HFValidationError, UnicodeError)):
        raise error
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)):
        return None  # a broken connection, or a response from a proxy or a login page
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return None if isinstance(error, (OSError, RuntimeError)) else _unexpected(error)


def _permanent_response(error: HfHubHTTPError, advice: Advice) -> tuple[type[HubError], str] | None:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return HubAccessError, f"access to the repository is restricted; {advice.login}"
    if isinstance(error, DisabledRepoError):
        return HubAccessError, "the repository is disabled by the Hub"
    if isinstance(error, RepositoryNotFoundError) and not (advice.writing and status in (401, 403)):
        return HubNotFoundError, f"there is no such repository; if it is private, {advice.login}"
    if isinstance(error, RevisionNotFoundError):
        return HubNotFoundError, "the repository has no such revision"
    advised = f". {_WITHOUT_XET}" if _XET_TOKEN.search(str(error.response.url)) else ""
    return _permanent_status(
        status,
        f"the Hub denied access (HTTP {status}); {advice.login}",
        f"{_describe_response(error.response, error.server_message)}{advised}",
    )


def _permanent_status(status: int, denied: str, failed: str) -> tuple[type[HubError], str] | None:
    if status in (401, 403):
        return HubAccessError, denied
    return None if status >= 500 or status in TEMPORARY_STATUS else (HubError, failed)


def _unexpected(error: Exception) -> tuple[type[HubError], str]:
    """What an error of huggingface_hub means that could not use a response; other errors are raised unchanged."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    values = (value for frame in reversed(frames) for value in frame.f_locals.values())
    response = next((value for value in values if isinstance(value, _Response)), None)
    if response is not None:
        reason = f"{_describe_response(response, None)}, which cannot be interpreted"
    elif frames and frames[-1].f_globals.get("__name__", "").startswith("huggingface_hub."):
        reason = "huggingface_hub cannot interpret the Hub's response"
    else:
        raise error
    details = f"{type(error).__name__}: {redact(str(error))[:_SHOWN]}"
    return HubError, f"{reason} ({details}); check HF_ENDPOINT, and that huggingface_hub is up to date"


def _root(error: Exception) -> Exception:
    """The underlying error, where huggingface_hub wraps it."""
    # "Not in the cache" wraps the reason why the Hub could not be reached.
    wrapper = isinstance(error, LocalEntryNotFoundError) or type(error) is RuntimeError
    return error.__cause__ if wrapper and isinstance(error.__cause__, Exception) else error


def _describe_response(response: Any, message: str | None) -> str:
    if not message:
        try:
            message = response.text
        except Exception:  # a body that was streamed or truncated, or that no encoding fits
            message = ""
    shown = " ".join("".join(sign if sign.isprintable() else " " for sign in redact(message)).split())
    return f"the Hub returned HTTP {response.status_code}" + (f": {shown[:_SHOWN]}" if shown else "")


def describe_failure(error: Exception) -> str:
    """Describe in a few words why a request failed, without credentials.

    Args:
        error: Raised by huggingface_hub.
    """
    error = _root(error)
    if isinstance(error, HubError):
        return redact(str(error))
    if isinstance(error, HfHubHTTPError):
        return f"the Hub returned HTTP {error.response.status_code}"
    if isinstance(error, json.JSONDecodeError):
        return "the response is not JSON"
    if isinstance(error, OSError) and str(error).startswith("Consistency check failed"):
        return "the response was shorter than announced"
    return f"{type(error).__name__}: {redact(str(error))[:_SHOWN]}"


def traceable(error: BaseException) -> BaseException | None:
    """Return an error for ``raise ... from``, or None if its traceback would show a credential.

    Args:
        error: The error; its causes are checked too.
    """
    link: BaseException | None = error
    while link is not None:
        if redact(str(link)) != str(link):
            return None
        link = link.__cause__ or link.__context__
    return error
