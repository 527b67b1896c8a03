"""Personal data found and replaced. All of it is made up: reserved names and numbers, and the
published test numbers of cards."""

import itertools
import time

import pytest

from gptcli.data.privacy import KINDS, find, redact
from gptcli.errors import DataError

EMAILS = [
    ("Write to zhang.san@example.com.", "Write to <EMAIL>."),
    ("邮箱zhangsan@example.com。请联系", "邮箱<EMAIL>。请联系"),
    ("全角：lisi＠example．com", "全角：<EMAIL>"),
    ("<mailto:J.Doe+news@mail.example.org>", "<mailto:<EMAIL>>"),
    ("josé@exämple.de", "<EMAIL>"),
]
PHONES = [
    ("电话13812345678号", "电话<PHONE>号"),
    ("手机：138-1234-5678", "手机：<PHONE>"),
    ("请拨打010-62345678。", "请拨打<PHONE>。"),
    ("电话１３８１２３４５６７８", "电话<PHONE>"),
    ("Call +1 (202) 555-0143 ext. 12 now", "Call <PHONE> now"),
    ("(202) 555-0143, 202-555-0143", "<PHONE>, <PHONE>"),
    ("Tel 2025550143", "Tel <PHONE>"),
    ("London: 020 7946 0018", "London: <PHONE>"),
    ("+49 30 23125 123", "<PHONE>"),
    ("Paris 01 99 00 12 34", "Paris <PHONE>"),
]
IPS = [
    ("from 203.0.113.7 and 192.168.1.20", "from <IP> and <IP>"),
    ("地址2001:db8::1的", "地址<IP>的"),
    ("http://198.51.100.4:8080/x", "http://<IP>:8080/x"),
]
CARDS = [
    ("card 4111 1111 1111 1111 12/27", "card <CARD> 12/27"),
    ("卡号5555555555554444。", "卡号<CARD>。"),
    ("3782-822463-10005 or 6011111111111117", "<CARD> or <CARD>"),
    ("GB82 WEST 1234 5698 7654 32", "<CARD>"),
    ("IBAN:DE89370400440532013000.", "IBAN:<CARD>."),
    ("TO BE68 5390 0754 7034 FROM ANN", "TO <CARD> FROM ANN"),
    ("账号FR1420041010050500013M02606，", "账号<CARD>，"),
]
IDS = [
    ("身份证11010519491231002X。", "身份证<NATIONAL_ID>。"),
    ("SSN 536-90-4399", "SSN <NATIONAL_ID>"),
    ("536904399 is my social security number", "<NATIONAL_ID> is my social security number"),
    ("NIR 2 55 08 14 168 025 38", "NIR <NATIONAL_ID>"),
    ("DNI: 54362315K", "DNI: <NATIONAL_ID>"),
    ("Aadhaar 2341 2341 2346", "Aadhaar <NATIONAL_ID>"),
    ("National Insurance AB123456C", "National Insurance <NATIONAL_ID>"),
    ("971013-9019902", "<NATIONAL_ID>"),
    ("身份证号码：44052419900101001X", "身份证号码：<NATIONAL_ID>"),
    ("身份证号为440524 19900101 0019。", "身份证号为<NATIONAL_ID>。"),
    ("身份证：440524900101001", "身份证：<NATIONAL_ID>"),
    ("SSN 078-05-1120", "SSN <NATIONAL_ID>"),
    ("078-05-1120 is not an SSN", "<NATIONAL_ID> is not an SSN"),
    ("passport number 123456789", "passport number <NATIONAL_ID>"),
    ("Passport No. C01X00T47, expired", "Passport No. <NATIONAL_ID>, expired"),
    ("护照 E12345678", "护照 <NATIONAL_ID>"),
    ("护照号码：EA1234567，", "护照号码：<NATIONAL_ID>，"),
    ("台灣身分證 A123456789", "台灣身分證 <NATIONAL_ID>"),
    ("香港身份證 A123456(3)", "香港身份證 <NATIONAL_ID>"),
]
# Put together here, so that scanners of repositories do not take them for real ones.
GITHUB = "ghp_" + "a1B2c3D4e5F6g7H8i9J0" + "k1L2m3N4o5P6q7R8"
HUGGING_FACE = "hf_" + "QwErTyUiOpAsDfGhJ" + "kLzXcVbNmQwErTyUi"
AWS = "AKIA" + "IOSFODNN7EXAMPLE"
PEM = "-----BEGIN RSA PRIVATE " + "KEY-----\n" + "MIIEowIBAAKCAQEA7abcdefgh\nabc+/=\n"
PEM_END = "-----END RSA PRIVATE " + "KEY-----"
SECRETS = [
    (f"token {GITHUB}, id {AWS}", "token <SECRET>, id <SECRET>"),
    ('password = "hunter2hunter2"', 'password = "<SECRET>"'),
    ("密码：Abc12345xyz7!", "密码：<SECRET>"),
    ("密码：Abc12345!", "密码：<SECRET>"),
    ("password: correcthorse9", "password: <SECRET>"),
    (f"use {HUGGING_FACE} here", "use <SECRET> here"),
    ("Authorization: Bearer abcdef1234567890abcdef1234567890", "Authorization: Bearer <SECRET>"),
    ("Authorization: Basic YWxhZGRpbjpvcGVuc2VzYW1lMTIz", "Authorization: Basic <SECRET>"),
    ("https://ann:pa55word@example.com/", "https://ann:<SECRET>@example.com/"),
    (f"{PEM}{PEM_END}\nAfter the key.", "<SECRET>\nAfter the key."),
    (PEM, "<SECRET>\n"),
    (f"abc+/=\n{PEM_END}\nmore", "<SECRET>\nmore"),
]
HARMLESS = [
    "In 1861 1862 1863 1864 he paid $12,345,678.90 for 1 234 567 acres.",
    "Genesis 1:26-31, Psalm 119:105-112, Matt 5:3-12; pages 211-227 (2003).",
    "2020-01-02 12:30:45, 05.11.2020, 05/11/2020, ISBN 978-0-306-40615-7, order 2012012345",
    "pi is 3.14159265358979, and +35236450.6 or -013030.000001",
    "版本10.0.19041.1，第1.2.3.4节，v1.2.3.4, Python 3.11.7; 127.0.0.1, 0.0.0.0, 255.255.255.0",
    "std::vector a::b 12:30:45 00:1b:44:11:3a:b7",
    "4111111111111112 2020 2021 2022 2023 110105194912310021",
    "git@github.com:owner/name.git icon@2x.png @app.route x@y",
    'password = "your_password_here" token = self.tokens[0] secret = os.environ["KEY"]',
    "密码是一个秘密，电话铃响了，他今年四十二岁，住在一百二十三号。",
    "sk-learn and hf_hub, the secret: nobody knows; key = value",
    "hf_thisIsAVeryLongFunctionNameInCamelCaseLetters hf_averylongnameinlowercaselettersonly",
    "the bearer internationalisation2 bonds; password: correcthorse, password = sha_256_hash",
    "GB82 WEST 1234 5698 7654 33, DE89370400440532013001, AB12 CDEF 3456 7890 1234",
    "44052419900101001X 078-05-1120 E12345678 A123456789 123456789",
    "Her passport was issued on 20200101 in 1987; 护照于20200101签发，身份证有18位数字。",
]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (kind, *case)
        for kind, cases in (
            *(("email", EMAILS), ("phone", PHONES), ("ip", IPS)),
            *(("card", CARDS), ("national_id", IDS), ("secret", SECRETS)),
        )
        for case in cases
    ],
)
def test_each_kind_alone_and_among_all(kind, text, expected):
    """Guards against personal data that is missed beside Chinese characters, in full-width digits
    or at a text's ends, and against another kind that takes part of it."""
    assert redact(text, [kind])[0] == expected
    assert redact(text, KINDS)[0] == expected
    assert redact(text, KINDS)[1] == {kind: expected.count("<" + kind.upper() + ">")}


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_numbers_are_left(text):
    """Guards against years, verses, prices, versions and code rewritten as personal data."""
    assert redact(text, KINDS) == (text, {})


def test_only_the_kinds_asked_for():
    """Guards against kinds that are replaced though they were not asked for."""
    text = "a.b@example.com 202-555-0143"
    assert redact(text, ["email"]) == ("<EMAIL> 202-555-0143", {"email": 1})
    assert redact(text, []) == (text, {})


def test_places_are_sorted_and_apart_whatever_overlaps():
    """Guards against an e-mail address found inside a password's URL, and places that no longer
    fit after digits were made ASCII."""
    text = (
        "１３８１２３４５６７８ https://ann:pa55word@example.com 4111 1111 1111 1111 b@example.org"
    )
    hits = find(text, KINDS)
    assert [kind for kind, _, _ in hits] == ["phone", "secret", "card", "email"]
    assert [text[a:b] for _, a, b in hits][1:3] == ["pa55word", "4111 1111 1111 1111"]
    assert all(a[2] <= b[1] for a, b in itertools.pairwise(hits))


@pytest.mark.parametrize(
    "text",
    [
        *("7" * 50000, "0" * 50000, "@" * 20000, "a@" * 20000, "ab:" * 20000, "A" * 50000),
        *("12 34 " * 10000, "0.123456," * 5000, "password=" * 5000, "eyJ" * 20000, "://a:" * 3000),
        *("护照" * 20000, "passport A" * 5000, "AB12" * 10000, "AB12 " * 10000, "bearer a" * 5000),
    ],
    ids=lambda text: text[:9],
)
def test_hostile_text_takes_bounded_time(text):
    """Guards against patterns whose time grows with the square of the text's length."""
    start = time.process_time()
    redact(text, KINDS)
    assert time.process_time() - start < 3


def test_a_missing_package_is_named(monkeypatch):
    """Guards against an ImportError in the middle of a run."""
    from gptcli.data.privacy import available_kinds, check_packages

    monkeypatch.setitem(__import__("sys").modules, "phonenumbers", None)
    with pytest.raises(DataError, match=r"filters\.redact phone needs the package phonenumbers"):
        check_packages(["email", "phone"])
    assert "phone" not in available_kinds()
