"""A text on which tokenizers that are not the same give different ids."""

# Words, digits, contractions, white space, code and scripts of several kinds.
_WORDS = (
    "Hello, world! I'LL don't we'Re it's 1234567890 3.14 x\u00a0y e\u0301 Ünïcödé ſ \u212a \t\r\n\n"
    "  中文的句子,没有空格。ひらがな カタカナ 한국어 Русский العربية हिन्दी ไทย"
    " 👩\u200d👩\u200d👧 🇩🇪 🙂🏽\n"
    "def f(x):\n\treturn {'a': [1, 2], **x}  # über-Maß\n    \n\n\nif (a!=b){c+=1;} ÄÖ_ß"
    " ½²Ⅷ\u2028\u0085\n "
)
_CHARACTERS = (*range(0x300), *range(0x300, 0x3400, 29), *range(0x3400, 0x1F700, 997))


def probe_text() -> str:
    """Some 40,000 characters in which regexes that two engines read differently show: characters
    of many scripts between letters, digits, spaces and line ends."""
    kept = [chr(c) for c in _CHARACTERS if not 0xD800 <= c < 0xE000]
    mixed = "".join(f"a{c}b 12{c}345678 {c}{c}\n {c}A'{c}\r\n\n  " for c in kept)
    return _WORDS + mixed + "".join(kept)
