"""The page at `/`, in a real browser: headless Chromium, driven by playwright."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ENDLESS, Server, serving

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright: no driver of browsers here"
)
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """Started before the browser, which brings threads that a fork must not meet."""
    with serving("--model", str(model), "--max-tokens", str(ENDLESS)) as running:
        yield running


@pytest.fixture(scope="module")
def locked(model: Path) -> Iterator[Server]:
    """A server with a token."""
    environment = {"GPT_SERVE_TOKEN": "s3cret"}
    with serving("--model", str(model), before=lambda: os.environ.update(environment)) as running:
        yield running


@pytest.fixture(scope="module")
def browser(server: Server, locked: Server) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page, and what its console said."""

    def __init__(self, browser: Any, address: str, width: int, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page.set_default_timeout(15_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def expect(self, selector: str) -> Any:
        return playwright.expect(self.page.locator(selector))

    def generate(self, **settings: Any) -> list[str]:
        """The texts, when all are there."""
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))
        self.page.click("#go")
        self.expect("#state").to_contain_text("tokens in")
        return self.page.locator(".text").all_text_contents()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_samples_side_by_side(browser: Any, server: Server, width: int, scheme: str) -> None:
    """Guards: a page that is wider than a phone, another text than the interface gives, markup that
    a text turns into, a script or style that its own policy forbids, requests elsewhere."""
    opened = Opened(browser, server.address, width, scheme)
    prompt = "<b>Once</b> "
    found = opened.generate(prompt=prompt, n=3, max_tokens=40, seed=7, temperature=1.2)
    asked = {"prompt": prompt, "n": 3, "max_tokens": 40, "seed": 7, "temperature": 1.2}
    _, expected, _ = server.complete(**asked, top_p=0.95)
    assert found == [prompt + choice["text"] for choice in expected["choices"]]
    assert not opened.page.locator(".text b").count()
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    lefts = {round(opened.page.locator("article").nth(i).bounding_box()["x"]) for i in range(3)}
    assert len(lefts) == (1 if width == 390 else 3)
    back = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 200) == (scheme == "dark")
    assert opened.said == []
    assert {url.rpartition(":")[2].split("/")[0] for url in opened.asked} == {str(server.port)}
    opened.page.close()


def test_what_else_could_have_come(browser: Any, server: Server) -> None:
    """Guards: probabilities of another token, or none without a mouse."""
    opened = Opened(browser, server.address, 1280)
    settings = {"prompt": "Once", "n": 1, "max_tokens": 12, "seed": 3, "temperature": 0.5}
    opened.generate(**settings)
    _, expected, _ = server.complete(**settings, top_p=0.95, logprobs=5)
    logprobs = expected["choices"][0]["logprobs"]
    ascii_only = [i for i, token in enumerate(logprobs["tokens"]) if not token.startswith("bytes:")]
    place = ascii_only[1]
    token = logprobs["tokens"][place].replace(" ", "·")
    opened.page.locator(".token", has_text=logprobs["tokens"][place]).first.hover()
    opened.expect("#chosen").to_contain_text(f"{token}  ")
    assert opened.page.locator("#rows .name").count() in (5, 6)
    shares = opened.page.locator("#rows .share").all_text_contents()
    values = [float(share.removesuffix(" %")) for share in shares]
    assert values == sorted(values, reverse=True)
    opened.page.click("#close")
    opened.expect("#details").to_be_hidden()
    opened.page.locator(".text").focus()
    opened.page.keyboard.press("Home")
    first = opened.page.locator(".token").first
    assert "at" in str(first.get_attribute("class"))
    opened.expect("#details").to_be_visible()
    opened.page.close()


def test_stop_keeps_what_came_and_frees_the_place(browser: Any, server: Server) -> None:
    """Guards: a button that only hides the text, while the model goes on."""
    opened = Opened(browser, server.address, 1280)
    for name, value in {"n": 2, "max_tokens": ENDLESS, "temperature": 0}.items():
        opened.page.fill(f"#{name}", str(value))
    opened.page.click("#go")
    opened.expect("article:nth-of-type(2) .token >> nth=20").to_be_visible()
    opened.page.click("#stop")
    opened.expect("#state").to_have_text("stopped")
    while server.health()["growing"]:
        opened.page.wait_for_timeout(20)
    assert opened.page.locator(".token").count() > 40
    opened.page.fill("#max_tokens", "2")
    opened.page.locator("#prompt").press("Control+Enter")
    opened.expect("#state").to_contain_text("tokens in")
    opened.page.close()


def test_errors_are_shown(browser: Any, server: Server) -> None:
    """Guards: a refusal that looks like an empty text."""
    opened = Opened(browser, server.address, 390)
    opened.page.fill("#prompt", "x" * 500)
    opened.page.click("#go")
    opened.expect("#error").to_contain_text(
        "the prompt has 501 tokens, and the model's context 128"
    )
    opened.generate(prompt="a", max_tokens=3)
    opened.expect("#error").to_be_hidden()
    opened.page.close()


def test_a_server_with_a_token(browser: Any, locked: Server) -> None:
    """Guards: a page that cannot be used there, a token that it keeps."""
    opened = Opened(browser, locked.address, 390)
    opened.expect("#error").to_contain_text("a token is needed")
    opened.page.fill("#token", "wrong")
    opened.page.click("#go")
    opened.expect("#error").to_contain_text("a token is needed")
    opened.page.fill("#token", "s3cret")
    assert opened.generate(max_tokens=3)
    opened.expect("#model").to_have_text("tiny")
    stored = opened.page.evaluate("localStorage.length + sessionStorage.length")
    assert (stored, opened.page.context.cookies()) == (0, [])
    opened.page.close()


def test_the_policy_of_the_page(server: Server) -> None:
    """Guards: a page that may load or run what is not in it, or stand in another site's frame."""
    _, text, headers = server.send("GET", "/")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text
