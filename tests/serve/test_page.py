"""The page at /, driven in headless Chromium as a reader would: type, see the answer grow, stop it, reload."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from octavo import LLM
from octavo.models.model import Model
from tests.conftest import wait_until
from tests.serve.conftest import Running, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

RULES = {"wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"}
MARKDOWN = """# Heading

**bold** *italic* ~~gone~~ `code` [link](https://example.com/page) [bad](javascript:alert(1)) ![a fox](https://example.com/fox.png)

- one
  1. inner

| name | value |
|---|---:|
| alpha | 22.5 |

> quote

```python
x = 1
```
"""
HOSTILE = "<img src=x onerror=\"document.title='harmed'\"> <b>bold</b>\n```html\n<script>1</script>\n```\n`a<b`"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def running(pamphlet: Model) -> Iterator[Running]:
    """Of a model of ordinary speed: answers must still grow when a browser on a busy machine looks."""
    llm = LLM(pamphlet, kv="int8-token", session_len=1024, max_batch_size=4)
    step = llm.engine.step

    def slow() -> Any:
        time.sleep(0.02)
        return step()

    llm.engine.step = slow  # type: ignore[method-assign]
    with serving(llm) as running:
        yield running


@contextmanager
def opened(browser: Any, running: Running, **options: Any) -> Iterator[Any]:
    """The page in a new window; nothing in it may fail or be forbidden by its own policy."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(running.url)
    try:
        yield page
        assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
    finally:
        context.close()
        running.assert_idle()


def ask(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def fields(page: Any, **more: Any) -> None:
    """Every request has these fields too."""

    def send(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, **more}))

    page.route("**/v1/chat/completions", send)


def shorten(page: Any, max_tokens: int) -> None:
    """Answers of at most so many tokens."""
    fields(page, max_tokens=max_tokens)


def done(page: Any) -> None:
    page.wait_for_selector("#send:visible", timeout=60_000)


def number(page: Any, id: str) -> int:
    text = page.text_content(f"#{id}").replace(",", "")
    return int(re.match(r"\d+", text)[0]) if text[0].isdigit() else 0  # type: ignore[index]


def test_an_answer_grows_and_is_stopped_and_is_there_after_a_reload(browser: Any, running: Running):
    with opened(browser, running) as page:
        assert page.is_visible("#empty")
        wait_until(lambda: number(page, "free") == 64)
        assert page.locator("#sheet rect.used, #sheet rect.kept").count() == 0
        fields(page, ignore_eos=True)
        ask(page, "Tell me a story")
        page.wait_for_selector(".turn.assistant p")
        first = page.inner_text(".turn.assistant .text")
        wait_until(lambda: len(page.inner_text(".turn.assistant .text")) > len(first) + 20)
        wait_until(lambda: number(page, "used") >= 1 and number(page, "sessions") == 1)
        page.keyboard.press("Escape")
        done(page)
        running.assert_idle()
        text = page.inner_text(".turn.assistant .text")
        assert page.inner_text(".turn.assistant .note") == "stopped"
        assert text.startswith(first.strip())
        assert len(text) > len(first)
        assert page.evaluate("document.activeElement.id") == "message"
        assert page.locator(".turn h2").all_inner_texts() == ["YOU", "PAMPHLET"]

        page.reload()
        assert page.locator(".turn .text").all_inner_texts() == ["Tell me a story", text]
        ask(page, "Go on")
        page.wait_for_selector("#stop:visible")
        page.click("#stop")
        done(page)
        page.click("#new")
        assert page.is_visible("#empty")
        page.reload()
        assert page.locator(".turn").count() == 0
        page.click("#chat-list .open")
        assert page.locator(".turn .text").first.inner_text() == "Tell me a story"


def test_the_gauge_moves_and_a_second_question_finds_the_first_in_the_cache(browser: Any, running: Running):
    with opened(browser, running) as page:
        fields(page, max_tokens=16, ignore_eos=True)
        ask(page, "Tell me a story about a cat. " * 12)
        done(page)
        ask(page, "And then?")
        page.wait_for_selector("#stop:visible")
        done(page)
        told = page.inner_text(".turn:last-child footer")
        assert re.search(r"^16 tokens · [\d.]+ tokens/s · \d+ of \d+ prompt tokens were in the cache", told)
        wait_until(lambda: page.locator("#sheet rect.kept").count() >= 2)
        wait_until(lambda: number(page, "hits") >= 64)
        assert number(page, "used") + number(page, "kept") + number(page, "free") == 64
        assert page.inner_text("#ratio") == "1.97× smaller"
        assert re.fullmatch(r"\d+ tokens, [\d.]+ [KM]iB", page.inner_text("#here"))


def test_text_is_text_whoever_wrote_it(browser: Any, running: Running):
    with opened(browser, running) as page:
        page.press("#message", "Shift+Enter")
        assert page.input_value("#message") == "\n"
        ask(page, HOSTILE)
        page.wait_for_selector(".turn.assistant")
        page.keyboard.press("Escape")
        done(page)
        shown = page.locator(".turn.user .text")
        if shown.count() == 0:  # stopped before the answer began: the message is back in its field
            assert page.input_value("#message") == HOSTILE
            ask(page, HOSTILE)
            page.wait_for_selector(".turn.assistant p")
            page.keyboard.press("Escape")
            done(page)
        assert shown.locator("img, b, script").count() == 0
        assert "<img src=x" in shown.inner_text()
        assert shown.locator("pre code").inner_text() == "<script>1</script>\n"
        assert shown.locator("p code").inner_text() == "a<b"
        assert "harmed" not in page.title()
        policy = page.request.get(running.url).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def kept(page: Any, *chats: tuple[str, list[str]]) -> None:
    """Conversations that the browser has kept; the first is the one that is open."""
    made = [
        {"id": id, "revision": 1, "title": id, "system": "", "updated": 100 - i, "turns": [
            {"role": "assistant" if j % 2 else "user", "content": text} for j, text in enumerate(texts)
        ]}
        for i, (id, texts) in enumerate(chats)
    ]  # fmt: skip
    page.evaluate(
        "chats => chats.forEach(one => localStorage.setItem('octavo.chat.' + one.id, JSON.stringify(one)))", made
    )
    page.evaluate("id => sessionStorage.setItem('octavo.current', id)", made[0]["id"])
    page.reload()


def test_markdown_is_shown_as_such_and_nothing_is_loaded_for_it(browser: Any, running: Running):
    with opened(browser, running) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        kept(page, ("Markdown", ["Show me *all*\nof it", MARKDOWN]))
        text = page.locator(".turn.assistant .text")
        for tag, inner in {"h3": "Heading", "strong": "bold", "em": "italic", "del": "gone", "p code": "code"}.items():
            assert text.locator(tag).inner_text() == inner
        assert text.locator("ul > li > ol > li").inner_text() == "inner"
        assert text.locator("blockquote p").inner_text() == "quote"
        assert text.locator("td[align=right]").inner_text() == "22.5"
        links = text.locator("a").evaluate_all("all => all.map(one => [one.textContent, one.href, one.rel])")
        assert links == [
            ["link", "https://example.com/page", "noopener noreferrer"],
            ["a fox", "https://example.com/fox.png", "noopener noreferrer"],
        ]
        assert text.locator("pre code.language-python").inner_text() == "x = 1\n"
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        text.get_by_role("button", name="Copy python code").click()
        wait_until(lambda: page.evaluate("navigator.clipboard.readText()") == "x = 1")
        assert page.locator(".turn.user .text").inner_text() == "Show me all\nof it"
        assert all(url.startswith(running.url) for url in asked)


def test_tabs_do_not_overwrite_one_anothers_conversations(browser: Any, running: Running):
    with opened(browser, running) as page:
        shorten(page, 4)
        ask(page, "First")
        done(page)
        other = page.context.new_page()
        other.goto(running.url)
        shorten(other, 4)
        assert other.locator(".turn").count() == 0, "a new tab begins a conversation of its own"
        ask(other, "Second")
        done(other)
        wait_until(lambda: page.locator("#chat-list .open").all_inner_texts() == ["Second", "First"])
        other.click("#chat-list .open >> text=First")
        wait_until(lambda: other.locator(".turn").count() == 2)
        for tab, text in ((page, "Third"), (other, "Fourth")):  # both go on with the same one
            fields(tab, max_tokens=300, ignore_eos=True)
            ask(tab, text)
        for tab in (page, other):
            tab.wait_for_selector(".turn.growing .block")
        for tab in (page, other):
            tab.click("#stop")
            done(tab)

        told = page.evaluate(
            """() => Object.keys(localStorage).filter(key => key.startsWith("octavo.chat."))
            .map(key => JSON.parse(localStorage[key]).turns.filter(turn => turn.role === "user")
            .map(turn => turn.content))"""
        )
        for tab, text in ((page, "Third"), (other, "Fourth")):
            questions = tab.locator(".turn.user .text").all_inner_texts()
            assert questions[0] == "First"
            assert questions[-1] == text
            assert questions in told, "what a tab shows is kept"
        assert ["Second"] in told
        other.on("dialog", lambda dialog: dialog.accept())
        other.hover("#chat-list li:has-text('Second')")
        other.get_by_role("button", name="Delete Second").click()
        assert "Second" not in other.locator("#chat-list .open").all_inner_texts()


def test_a_question_is_edited_and_an_answer_made_again(browser: Any, running: Running):
    with opened(browser, running) as page:
        shorten(page, 6)
        kept(page, ("Old", ["One", "Two", "Three", "Four"]))
        page.press("#message", "ArrowUp")
        assert page.evaluate("document.activeElement.value") == "Three"
        page.keyboard.press("Escape")
        assert page.locator(".turn .text").all_inner_texts() == ["One", "Two", "Three", "Four"]
        page.get_by_role("button", name="Edit").first.click()
        page.keyboard.press("ControlOrMeta+A")
        page.keyboard.type("Uno")
        page.keyboard.press("Enter")
        done(page)
        first = page.locator(".turn .text").all_inner_texts()
        assert first[0] == "Uno"
        assert len(first) == 2
        page.get_by_role("button", name="Regenerate").click()
        page.wait_for_selector("#stop:visible")
        done(page)
        assert page.locator(".turn .text").all_inner_texts()[0] == "Uno"
        assert page.locator(".turn").count() == 2


def test_settings_go_with_every_request_and_outlive_a_reload(browser: Any, running: Running):
    with opened(browser, running) as page:
        bodies: list[Any] = []
        page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
        page.click("#open-settings")
        for field, value in {"temperature": "0.5", "top_k": "5", "max_tokens": "3", "system": "Be terse."}.items():
            page.fill(f"#{field}", value)
        page.select_option("#theme", "dark")
        page.keyboard.press("Tab")
        page.click("#save-settings")
        assert page.inner_text("#system-note") == "Be terse."
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 23, 20)"
        ask(page, "Hello")
        done(page)
        (body,) = bodies
        assert {name: body[name] for name in ("temperature", "top_k", "max_tokens")} == {
            "temperature": 0.5,
            "top_k": 5,
            "max_tokens": 3,
        }
        assert body["messages"][0] == {"role": "system", "content": "Be terse."}
        assert "cut off" in page.inner_text(".turn.assistant footer")


@pytest.mark.parametrize(("width", "scheme"), [(1400, "dark"), (390, "light")])
def test_axe_finds_nothing_to_complain_of(browser: Any, running: Running, width: int, scheme: str):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()

    def look(page: Any) -> None:
        rules = {"runOnly": sorted(RULES)}
        found = axe.run(page, options=rules).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []

    with opened(browser, running, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        kept(page, ("Markdown", ["Show me", MARKDOWN]), ("Another", ["One", "Two"]))
        wait_until(lambda: number(page, "free") > 0 or width < 800)
        look(page)
        page.get_by_role("button", name="Edit").click()
        look(page)
        page.click("#open-settings")
        look(page)
        page.keyboard.press("Escape")
        if page.is_visible("#open-chats"):
            page.click("#open-chats")
            look(page)
            page.keyboard.press("Escape")
            assert page.evaluate("document.activeElement.id") == "open-chats"
        page.click("#new")
        look(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_refused_message_is_not_lost(browser: Any, running: Running):
    with opened(browser, running) as page:
        long = "word " * 2000
        page.fill("#message", long)
        page.press("#message", "Enter")
        wait_until(lambda: "session holds 1024" in page.inner_text("#complaint"))
        assert page.input_value("#message") == long.strip()
        assert page.locator(".turn").count() == 0


def test_a_server_with_a_key_is_asked_for_it_on_a_phone(browser: Any, pamphlet: Model):
    llm = LLM(pamphlet, kv="int8-token", session_len=256, max_batch_size=2)
    phone = {"viewport": {"width": 390, "height": 844}}
    with serving(llm, api_key="secret") as running, opened(browser, running, **phone) as page:
        assert not page.is_visible("#sheet"), "the panel is folded"
        ask(page, "Tell me a story")
        wait_until(lambda: "asks for a key" in page.inner_text("#complaint"))
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("secret")
        assert page.input_value("#message") == "Tell me a story"
        page.press("#message", "Enter")
        page.wait_for_selector(".turn.assistant p")
        page.keyboard.press("Escape")
        done(page)
        wait_until(lambda: number(page, "free") > 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
