"""What a command said, line by line of its stderr."""


def errors(err: str) -> list[str]:
    """The `error: ` lines without their mark."""
    assert "Traceback" not in err
    return [line[7:] for line in err.splitlines() if line.startswith("error: ")]


def hints(err: str) -> str:
    """The `hint: ` lines without their mark."""
    return "\n".join(line[6:] for line in err.splitlines() if line.startswith("hint: "))


def warnings(err: str) -> str:
    """The `warning: ` lines without their mark."""
    return "\n".join(line[9:] for line in err.splitlines() if line.startswith("warning: "))
