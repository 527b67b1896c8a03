"""Errors a user can cause. Each carries the exit code that the command line returns for it."""


class GptError(Exception):
    """Base of all expected errors: `message` says what and where, `hint` what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(GptError):
    """Wrong usage or configuration. `problems` holds every problem found, one line each."""

    exit_code = 2

    def __init__(self, problems: str | list[str], hint: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems), hint)


class DataError(GptError):
    """A corpus, task file or tokenizer cannot be used."""

    exit_code = 3


class CheckpointError(GptError):
    """A checkpoint or model is missing, damaged or does not fit."""

    exit_code = 4


class NonFiniteError(GptError):
    """Training met non-finite losses or gradients too often."""

    exit_code = 5


class ResourceError(GptError):
    """Memory, disk, device or lock not available."""

    exit_code = 6


class LostRankError(ResourceError):
    """The process that would tell of an error is gone, so that any other has to."""


class PeerError(GptError):
    """Another process of the same job ended with an error, and told of it itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
