def test_doctor(gpt):
    """The first thing asked for in a bug report must work on any machine."""
    code, out, err = gpt("doctor")
    assert (code, err) == (0, "")
    facts = {line.split()[0] for line in out.splitlines()}
    assert {"gptcli", "python", "torch", "cpu", "auto", "memory", "free", "tokenizer"} <= facts
    assert "\x1b" not in out
