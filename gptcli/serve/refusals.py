"""Errors as OpenAI's clients know them: a status, and what, where and why as JSON."""

from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class RefusedError(Exception):
    """A request that is answered with an error: `param` names the field at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        """What belongs to the status."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": "1"} if self.status in (429, 503) else {}

    def to_json(self) -> dict[str, Any]:
        """The object that OpenAI's clients read."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def wrong(param: str, message: str, code: str = "invalid_value") -> RefusedError:
    """The error of a field that cannot be taken as it is."""
    return RefusedError(400, f"{param}: {message}", param=param, code=code)
