"""Keys, tokens and passwords in text, by the published formats of those who issue them.

Tokens of AWS, GitHub, GitLab, Slack, Google, Stripe, OpenAI, Anthropic, Hugging Face, npm, PyPI,
SendGrid, DigitalOcean and Telegram, JSON web tokens (RFC 7519), PEM private keys (RFC 7468, also
when a piece of text begins or ends inside one), passwords in URLs, HTTP credentials behind
`Bearer` (RFC 6750) or `Authorization: Basic`, and assignments such as `password = "..."` whose
value looks random (Shannon entropy; less is asked behind a word for a password, since people think
those up). Of these last ones only the value counts, so that a model still learns the form.

Passwords without a digit or shorter than 8 characters, and those in a sentence ("the password is
..."), are not found: ordinary words look like them.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

# What a token begins with -> its whole pattern. `in` finds these fixed strings far faster than an
# alternation of patterns would.
_TOKENS = {
    "AKIA": r"AKIA[A-Z0-9]{16}(?![A-Za-z0-9])",
    "ASIA": r"ASIA[A-Z0-9]{16}(?![A-Za-z0-9])",
    "ghp_": r"ghp_[A-Za-z0-9]{36,255}",
    "gho_": r"gho_[A-Za-z0-9]{36,255}",
    "ghu_": r"ghu_[A-Za-z0-9]{36,255}",
    "ghs_": r"ghs_[A-Za-z0-9]{36,255}",
    "ghr_": r"ghr_[A-Za-z0-9]{36,255}",
    "github_pat_": r"github_pat_[A-Za-z0-9_]{36,255}",
    "glpat-": r"glpat-[A-Za-z0-9_\-]{20,300}",
    "xox": r"xox[abeoprs]-[A-Za-z0-9\-]{10,250}",
    "xapp-": r"xapp-[0-9]-[A-Za-z0-9\-]{20,250}",
    "hooks.slack.com": r"hooks\.slack\.com/services/[A-Za-z0-9/+]{20,80}",
    "AIza": r"AIza[A-Za-z0-9_\-]{35}(?![A-Za-z0-9_\-])",
    "ya29.": r"ya29\.[A-Za-z0-9_\-]{20,2000}",
    "GOCSPX-": r"GOCSPX-[A-Za-z0-9_\-]{28}",
    "_live_": r"[rsp]k_live_[A-Za-z0-9]{16,250}",
    "_test_": r"[rsp]k_test_[A-Za-z0-9]{16,250}",
    "whsec_": r"whsec_[A-Za-z0-9+/=]{24,250}",
    "sk-": r"sk-(?:ant-|proj-|svcacct-|admin-|or-)?[A-Za-z0-9_\-]{20,250}",
    "hf_": r"hf_[A-Za-z0-9]{30,60}",
    "npm_": r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])",
    "pypi-": r"pypi-AgE[A-Za-z0-9_\-]{50,2000}",
    "SG.": r"SG\.[A-Za-z0-9_\-]{16,32}\.[A-Za-z0-9_\-]{16,64}",
    "dop_v1_": r"dop_v1_[a-f0-9]{64}",
    ":AA": r"[0-9]{8,10}:AA[A-Za-z0-9_\-]{33}(?![A-Za-z0-9_\-])",
    "eyJ": r"(?<![A-Za-z0-9_\-])eyJ[A-Za-z0-9_\-]{8,4096}\.eyJ[A-Za-z0-9_\-]{8,8192}"
    r"(?:\.[A-Za-z0-9_\-]{0,2048})?",
}
_PATTERNS = {start: re.compile(pattern) for start, pattern in _TOKENS.items()}
# All of a PEM block, and the parts of one that another piece of the text has the rest of.
_PEM = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:\s|\\[nr])*(?:(?:Proc-Type|DEK-Info|Version|Comment):[^\n]*|[A-Za-z0-9+/=]{16,}"
    r"|[A-Za-z0-9+/=]{1,76}(?=(?:\s|\\[nr])*(?:-----END|\Z))))*"
    r"(?:(?:\s|\\[nr])*-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)?"
)
_PEM_REST = re.compile(
    r"\A[A-Za-z0-9+/=\s]*-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
)
_URL_PASSWORD = re.compile(r"://[^\s/:@\"'<>]{1,64}:([^\s/@\"'<>]{3,128})@")
_CREDENTIALS = re.compile(
    r"(?i:(?P<header>authorization[\"']?[:=][ \t]*[\"']?(?:bearer|basic|token|apikey))"
    r"|bearer)[ \t]+(?P<value>[A-Za-z0-9._~+/\-]{16,4096}={0,2})"
)
_CREDENTIAL_SIGNS = (
    *("bearer ", "Bearer ", "BEARER "),
    *("uthorization:", 'uthorization"', "uthorization'", "AUTHORIZATION:"),
)
_ASSIGNED = re.compile(r"[:=：](?:>|=)?[ \t]*([\"'`]?)([!-&(-;=?-_a-~]{8,512})")
_NAME_BEFORE = re.compile(
    r"(?:pass(?:word|wd|phrase)?|pwd|secret|api[_\- ]?key|(?:access|auth|private|secret|account|"
    r"encryption|signing)[_\- ]?key|token|credentials?|密码|密碼|口令|密钥|密鑰|令牌)"
    r"[A-Za-z0-9_]{0,16}[\"'`]?[ \t]*$",
    re.IGNORECASE,
)
_PASSWORD_BEFORE = re.compile(
    r"(?:pass(?:word|wd|phrase)?|pwd|密码|密碼|口令)[\"'`]?[ \t]*$", re.IGNORECASE
)


def find(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of secrets, in characters."""
    if "PRIVATE KEY" in text:
        for match in _PEM.finditer(text):
            yield match.span()
        rest = _PEM_REST.match(text)
        if rest:
            yield rest.span()
    for start, pattern in _PATTERNS.items():
        if start in text:
            for match in pattern.finditer(text):
                before = text[match.start() - 1 : match.start()]
                if not (before.isascii() and before.isalnum()) and (
                    _random(match[0]) or _mixed_case(match[0][len(start) :])
                ):
                    yield match.span()
    if "://" in text:
        for match in _URL_PASSWORD.finditer(text):
            yield match.span(1)
    if any(sign in text for sign in _CREDENTIAL_SIGNS):
        for match in _CREDENTIALS.finditer(text):
            value = match["value"]
            # "the bearer ..." may be prose: one digit in a word is not enough.
            enough = match["header"] or sum(map(str.isdigit, value)) >= 3
            if enough and (_random(value) or _mixed_case(value)) and _entropy(value) >= 3.0:
                yield match.span("value")
    yield from _assigned(text)


def _assigned(text: str) -> Iterator[tuple[int, int]]:
    # Random strings of 12 characters have about 3.4 bits a character, English words below 3.
    for match in _ASSIGNED.finditer(text):
        before = text[max(0, match.start() - 48) : match.start()]
        if not _NAME_BEFORE.search(before):
            continue
        quote, value = match[1], match[2].rstrip(".,;)]}" if not match[1] else "")
        if quote:
            value = value.partition(quote)[0]
        # Without quotes it may be code (token = self.tokens[0]): then only one plain, longer word.
        plain = re.fullmatch(r"[A-Za-z0-9+/=_\-!@#$%^&*~]+", value) is not None
        # A name such as sha_256 may stand there in code; without "_" it is likely a password.
        chosen = "_" not in value and _PASSWORD_BEFORE.search(before) is not None
        easy = bool(quote) or chosen
        long = len(value) >= (8 if easy else 12) and (quote or plain)
        if long and _random(value) and _entropy(value) >= (2.6 if easy else 3.0):
            yield match.start(2), match.start(2) + len(value)


def _random(value: str) -> bool:
    """Whether letters and digits are mixed, as in generated values, and it is no placeholder."""
    digits = sum(map(str.isdigit, value))
    letters = sum(map(str.isalpha, value))
    return bool(digits and letters and len(set(value)) > 5)


def _mixed_case(value: str) -> bool:
    """Whether it is letters alone with capitals all over, which no name in CamelCase has."""
    capitals = sum(map(str.isupper, value))
    return value.isalpha() and 0.25 <= capitals / len(value) <= 0.75 and len(set(value)) > 9


def _entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits a character."""
    counts = Counter(value).values()
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts)
