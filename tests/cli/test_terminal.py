from gptcli.cli.terminal import columns


def test_columns():
    table = columns([["a", "1"], ["long", "200"]], right=frozenset({1}))
    assert table == "a       1\nlong  200\n"
    assert columns([]) == ""


def test_stderr_gone(shell):
    """An error that cannot be told still has its exit code."""
    assert shell("gpt pretrain --bogus 2>&-").returncode == 2
