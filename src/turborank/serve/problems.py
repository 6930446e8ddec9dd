"""What can go wrong with an HTTP request, as one exception that every dialect can write down."""

from __future__ import annotations

import math

from turborank.errors import ModelNotFoundError, TooLongError, TurborankError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Problem(Exception):  # noqa: N818 - an answer, not a fault of ours
    """An answer that is not a ranking.

    ``param`` is the JSON path of the field at fault; ``retry_after``, in seconds, makes a Retry-After header.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """The OpenAI name of this kind of error."""
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the answer, whatever its dialect."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after * 1000)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def from_error(error: TurborankError, *, param: str | None = None) -> Problem:
    """A library error as an HTTP answer. Faults of ours keep their text for the log, not for the client."""
    if isinstance(error, TooLongError):  # 400 is what OpenAI-style servers answer
        return Problem(400, error.code, str(error), param=param)
    if isinstance(error, ModelNotFoundError):
        return Problem(503, "model_unavailable", "the model cannot be loaded at the moment; see the server's log")
    if error.status >= 500:
        return Problem(500, error.code, "the engine failed; see the server's log under this request id")
    return Problem(error.status, error.code, str(error), param=param)
