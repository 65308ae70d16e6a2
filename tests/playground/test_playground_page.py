# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, before a real Triton server whose model writes HTML and control characters."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, Browser
from playground_process import HOSTILE

from adaptive_k_moe.client import Client
from adaptive_k_moe.model_repository import TritonServer

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium")

PROMPT = "<b>And</b>\u001b And it came to pass"
IDLE = "document.querySelector('#stop').disabled && !document.querySelector('#run').disabled"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, page: str) -> Iterator[Browser]:
    """The browser on a fresh page that knows its server; it must not complain of anything afterwards."""
    chromium.events.clear()
    chromium.open(page)
    chromium.until(IDLE)
    yield chromium
    assert chromium.problems() == []
    assert all(url.startswith(page) for url in chromium.requested())


def _run(browser: Browser, prompt: str = PROMPT, tokens: int = 24, seconds: float = 60) -> None:
    browser.fill("#prompt", prompt)
    browser.fill("#max-tokens", str(tokens))
    browser.click("#run")
    browser.until("!document.querySelector('#stop').disabled || document.querySelector('.piece')")
    browser.until(IDLE, seconds)


def _pieces(browser: Browser, side: int = 1) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = browser.evaluate(
        f"Array.from(document.querySelectorAll('.side:nth-child({side}) .piece'), (piece) => ({{"
        " text: piece.textContent, label: piece.getAttribute('aria-label'),"
        " share: Number(piece.style.getPropertyValue('--share')), colour: getComputedStyle(piece).backgroundColor }))"
    )
    return pieces


def test_tokens_are_coloured_by_their_average_k(browser: Browser, server: TritonServer) -> None:
    _run(browser)
    with Client(server.grpc_url, timeout=60) as client:
        answer = client.generate(PROMPT, max_tokens=24)
    pieces = _pieces(browser)
    average = answer.k.mean(axis=1)
    assert len(pieces) == len(average)  # every token of this answer is text of its own
    np.testing.assert_allclose([piece["share"] for piece in pieces], average - 1, atol=1e-6)
    assert len({piece["colour"] for piece in pieces}) == len(set(average.tolist()))
    assert f"{answer.avg_k:.2f}" != f"{average.mean():.2f}"  # the server counts the prompt, too
    assert browser.text(".avg-k").split("\n")[0] == f"{answer.avg_k:.2f}"
    assert browser.text(".reads").split("\n") == [
        f"{answer.reads_per_token:.2f}", f"{answer.avg_reads:.2f} a step and layer"
    ]  # fmt: skip
    assert not browser.evaluate("document.querySelector('.followed').checkVisibility()")
    assert browser.text(".saved").split("\n")[0] == f"{100 * answer.compute_saved_ratio:.1f} %"
    assert float(browser.text(".speed").split()[0]) > 0


def test_what_the_model_and_the_user_write_stays_text(browser: Browser) -> None:
    _run(browser)
    assert browser.text(".asked") == PROMPT.replace("\u001b", "\u241b")
    pieces = _pieces(browser)
    shown = HOSTILE.replace("\u0007", "\u2407").replace("\u202e", "U+202E").replace("\u0000", "\u2400")
    assert [piece for piece in pieces if piece["text"] == shown]
    assert browser.evaluate("document.querySelectorAll('.answer img, .answer b, .answer script').length") == 0
    assert browser.evaluate("window.struck") is None
    text = browser.evaluate("document.querySelector('.answer').textContent")
    assert not set(text) & {"\u0007", "\u202e", "\u0000"}


def test_every_character_that_cannot_be_seen_has_a_sign(browser: Browser) -> None:
    """Python's table of Unicode says which those are: controls, formats, separators of lines."""
    every = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    hidden = [c for c in every if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\t"]
    seen = [c for c in every if unicodedata.category(c)[0] in "LMNPS" or c in "\t \u00a0"]
    code = "import('/static/text.js').then(({spoken}) => CHARACTERS.map((each) => spoken(each)))"
    signs = browser.evaluate(code.replace("CHARACTERS", json.dumps(hidden)))
    assert len(hidden) > 200
    for character, sign in zip(hidden, signs, strict=True):
        assert sign and character not in sign and all(unicodedata.category(c)[0] in "LNPS" for c in sign)
    assert len(set(signs)) == len(hidden)
    some = seen[::97]
    assert browser.evaluate(code.replace("CHARACTERS", json.dumps(some))) == some


def test_a_pointer_shows_the_layers_of_a_token(browser: Browser, server: TritonServer) -> None:
    _run(browser)
    with Client(server.grpc_url, timeout=60) as client:
        answer = client.generate(PROMPT, max_tokens=24)
    assert browser.text(".token").startswith("All tokens")
    browser.hover(".piece[data-index='3']")
    browser.until("document.querySelector('.token').innerText.includes('token 4')")
    texts = browser.evaluate("Array.from(document.querySelectorAll('.layers text'), (text) => text.textContent)")
    expected = [f"{nats:.2f}" for nats in answer.entropy[3]]
    assert [text for text in texts if "." in text] == expected
    assert [text for text in texts if text.startswith("k ")] == [f"k {k}" for k in answer.k[3]]
    heights = browser.evaluate(
        "Array.from(document.querySelectorAll('.layers rect'), (bar) => bar.height.baseVal.value)"
    )
    np.testing.assert_allclose(heights, np.maximum(1, answer.entropy[3] / np.log(8) * 54), rtol=1e-3)


def test_a_seed_that_no_server_would_take_is_refused_in_the_page(browser: Browser) -> None:
    for seed, fine in (("9007199254740991", True), ("9007199254740992", False), ("-1", False), ("", False)):
        browser.fill("#seed", seed)
        assert browser.evaluate("document.querySelector('#question').checkValidity()") is fine


def test_a_prompt_can_be_a_chat_message(browser: Browser, server: TritonServer) -> None:
    with Client(server.grpc_url, timeout=60) as client:
        answer = client.generate([{"role": "user", "content": PROMPT}], max_tokens=24)
        assert answer.avg_k != client.generate(PROMPT, max_tokens=24).avg_k
    browser.click("#chat")
    _run(browser)
    average = answer.k.mean(axis=1)
    np.testing.assert_allclose([piece["share"] for piece in _pieces(browser)], average - 1, atol=1e-6)


def test_the_keyboard_does_all(browser: Browser, server: TritonServer) -> None:
    browser.evaluate("document.querySelector('#prompt').focus()")
    browser.fill("#max-tokens", "24")
    browser.press("Enter", control=True)
    browser.until("document.querySelector('.piece')")
    browser.until(IDLE)
    names = []
    for _ in range(10):
        browser.press("Tab")
        names.append(browser.evaluate("document.activeElement.id || document.activeElement.className"))
    # The page's last stop is the answer, which is one stop for all of its tokens; Tab goes out of it again.
    assert names[:6] == ["max-tokens", "temperature", "seed", "chat", "compare", "run"]
    assert names[6:8] == ["policy", "answer"]
    browser.evaluate("document.querySelector('.answer').focus()")
    for key, index in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 23),
        ("ArrowRight", 23),
        ("Home", 0),
    ):
        browser.press(key)
        active = browser.evaluate("document.querySelector('.answer').getAttribute('aria-activedescendant')")
        selected = browser.evaluate("document.querySelector('[aria-selected=true]').dataset.index")
        assert (active, selected) == (f"Answer-{index}", str(index))
    assert browser.text(".token").split(" · ")[1] == "token 1"
    described = browser.evaluate("document.querySelector('[aria-selected=true]').getAttribute('aria-description')")
    assert described.startswith("layer 0: ") and described.count("nats") == 6


def test_everything_has_a_name(browser: Browser) -> None:
    """Roles and names as Chromium gives them to a screen reader."""
    browser.click("#compare")
    _run(browser, tokens=4)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    spoken = [node for node in nodes if not node.get("ignored")]
    # Chromium 150 keeps the space between a label's words and its field.
    told = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in spoken]
    for role in ("textbox", "spinbutton", "checkbox", "button", "combobox", "listbox", "option", "image"):
        names = [name for found, name in told if found == role]
        assert names or role in ("image",), role
        assert all(names), (role, names)
    names = {name for _, name in told}
    assert {"Prompt", "Most tokens", "Run", "Stop", "Policy, Answer", "Policy, Second answer"} <= names


def test_two_policies_side_by_side(browser: Browser, server: TritonServer) -> None:
    browser.click("#compare")
    assert browser.evaluate("document.querySelectorAll('.side').length") == 2
    assert browser.evaluate("Array.from(document.querySelectorAll('.policy'), (each) => each.value)") == [
        "balanced",
        "full",
    ]
    browser.fill(".side:nth-child(1) .policy", "top1")
    _run(browser)
    assert {piece["share"] for piece in _pieces(browser, 1)} == {0}
    assert {piece["share"] for piece in _pieces(browser, 2)} == {1}
    assert browser.text(".side:nth-child(1) .saved").split("\n")[0] == "50.0 %"
    speeds = [float(browser.text(f".side:nth-child({side}) .speed").split()[0]) for side in (1, 2)]
    told = browser.text(".side:nth-child(1) .against")
    assert told.startswith("Against full: ") and "one pair, run one after the other" in told
    assert float(told.split()[2]) == pytest.approx(speeds[0] / speeds[1], abs=0.011)
    browser.click("#together")
    browser.fill("#pairs", "4")
    _run(browser)
    told = browser.text(".side:nth-child(1) .against")
    assert told.partition(":")[0] == "Against full"
    assert "the median of 4 pairs" in told and "run at once" in told
    lowest, highest = (float(word) for word in told.partition("pairs (")[2].partition(")")[0].split(" to "))
    assert lowest <= float(told.split()[2]) <= highest


def test_layers_of_all_tokens_until_one_is_asked_for(browser: Browser, server: TritonServer) -> None:
    _run(browser)
    with Client(server.grpc_url, timeout=60) as client:
        answer = client.generate(PROMPT, max_tokens=24)
    told = browser.evaluate("document.querySelector('.layers').getAttribute('aria-label')")
    means = zip(answer.entropy.mean(axis=0), answer.k.mean(axis=0), strict=True)
    for layer, ((nats, k), part) in enumerate(zip(means, told.split("; "), strict=True)):
        number, _, values = part.partition(": ")
        assert number == f"layer {layer}"
        found = [float(value.removesuffix(" nats").removeprefix("k ")) for value in values.split(", ")]
        np.testing.assert_allclose(found, [nats, k], atol=0.0051)


def test_stop_before_the_second_side_has_begun(browser: Browser) -> None:
    browser.click("#compare")
    browser.fill("#max-tokens", "900")
    browser.click("#run")
    browser.until("document.querySelectorAll('.side:nth-child(1) .piece').length > 3")
    browser.press("Escape")
    browser.until(IDLE)
    assert _pieces(browser, 2) == []
    assert browser.text(".side:nth-child(1) .against") == ""


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_request_on_the_server(browser: Browser, server: TritonServer, page: str, how: str) -> None:
    browser.fill("#prompt", PROMPT)
    browser.fill("#max-tokens", "900")
    browser.click("#run")
    browser.until("document.querySelectorAll('.piece').length > 3")
    if how == "button":
        browser.click("#stop")
    else:
        browser.press("Escape")
    browser.until(IDLE)
    assert len(_pieces(browser)) < 900
    assert browser.evaluate("document.querySelector('.failure').hidden")
    browser.until(f"fetch('{page}api/metrics').then((answer) => answer.json()).then((all) => all.running === 0)")


def test_charts_follow_the_server(browser: Browser) -> None:
    _run(browser, tokens=200)
    browser.until("document.querySelectorAll('.chart').length === 4")
    browser.until("Array.from(document.querySelectorAll('.keys span'), (key) => key.textContent).includes('waiting 0')")
    # The rate of a chart is drawn once there are two readings; ours made it more than nothing.
    browser.until("Number(document.querySelector('.chart output').textContent.split('at most ')[1]) > 0")
    assert browser.evaluate("document.querySelectorAll('.chart svg[aria-label]').length") == 4


def test_lines_of_several_policies_can_be_told_apart(browser: Browser) -> None:
    numbers = {"generation_tokens": 1, "running": 0, "waiting": 0, "kv_used": 0, "kv_blocks": 1}
    numbers["avg_k"] = {f"policy-{number}": number for number in range(8)}
    history = json.dumps([{"at": at, "numbers": numbers} for at in (1, 2)])
    looks = browser.evaluate(
        "import('/static/charts.js').then(({Charts}) => {"
        " const place = document.querySelector('#charts');"
        " const charts = new Charts(place, document.createElement('p'));"
        f" charts.history = {history}; charts.draw(3);"
        " const look = (each, part) => { const style = getComputedStyle(each, part);"
        " return [style.stroke, style.strokeDasharray, style.borderTopColor, style.borderTopStyle].join(); };"
        " const last = place.lastElementChild;"
        " return [Array.from(last.querySelectorAll('polyline'), (line) => look(line)),"
        " Array.from(last.querySelectorAll('.keys span'), (key) => look(key, '::before'))]; })"
    )
    assert [len(set(each)) for each in looks] == [8, 8]


@pytest.mark.parametrize("dark", [False, True])
def test_it_looks_as_it_should(browser: Browser, tmp_path: Path, dark: bool) -> None:
    """Both ends of the colours are on a picture of the page, and its ground is light or dark."""
    image = pytest.importorskip("matplotlib.image")
    browser.prefer_dark(dark)
    browser.click("#compare")
    browser.fill(".side:nth-child(1) .policy", "top1")
    _run(browser)
    browser.screenshot(tmp_path / "page.png")
    browser.prefer_dark(False)
    pixels = image.imread(tmp_path / "page.png")[..., :3]
    few, many, ground = (
        ((31, 58, 92), (168, 86, 26), (17, 21, 28)) if dark else ((216, 232, 250), (255, 168, 92), (245, 246, 248))
    )
    for colour, least in ((few, 2000), (many, 2000), (ground, 50_000)):
        assert (np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.02).sum() > least, colour


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_forced_colours_leave_those_of_k(browser: Browser, scheme: str) -> None:
    features = {"forced-colors": "active", "prefers-color-scheme": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[{"name": key, "value": features[key]} for key in features])
    _run(browser)
    pieces = _pieces(browser)
    ink = browser.evaluate("getComputedStyle(document.querySelector('.piece')).color")
    browser.prefer_dark(False)
    assert len({piece["colour"] for piece in pieces}) == len({piece["share"] for piece in pieces}) > 2
    assert ink == ("rgb(27, 35, 48)" if scheme == "light" else "rgb(230, 234, 241)")


def test_a_narrow_page_needs_no_sideways_scrolling(browser: Browser) -> None:
    browser.click("#compare")
    _run(browser)
    browser.call("Emulation.setDeviceMetricsOverride", width=380, height=800, deviceScaleFactor=1, mobile=False)
    try:
        assert browser.evaluate("document.documentElement.scrollWidth") <= 380
    finally:
        browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)


def test_the_answer_to_a_long_prompt_is_in_view_until_its_reader_scrolls_away(browser: Browser) -> None:
    below = "document.querySelector('.answer').scrollHeight - document.querySelector('.answer').clientHeight"
    bottom = f"{below} - document.querySelector('.answer').scrollTop"
    _run(browser, "And it came to pass, \n" * 40, tokens=100)
    assert browser.evaluate(
        "document.querySelector('.asked').offsetHeight > document.querySelector('.answer').offsetHeight"
    )
    assert browser.evaluate(bottom) < 2
    browser.fill("#max-tokens", "700")
    browser.click("#run")
    browser.until("document.querySelectorAll('.piece').length > 3")
    browser.evaluate("document.querySelector('.answer').scrollTop = 0")
    pieces = browser.evaluate("document.querySelectorAll('.piece').length")
    browser.until(f"document.querySelectorAll('.piece').length > {pieces}")
    browser.until(IDLE)
    assert browser.evaluate("document.querySelector('.answer').scrollTop") == 0


def test_pieces_that_come_at_once_are_laid_out_once(browser: Browser) -> None:
    """However many tokens are on the page, and however fast they come."""

    def layouts() -> float:
        metrics = browser.call("Performance.getMetrics")["metrics"]
        return next(float(metric["value"]) for metric in metrics if metric["name"] == "LayoutCount")

    browser.call("Performance.enable")
    _side(browser, ["full"])
    before = layouts()
    browser.evaluate(
        "(() => { for (let index = 0; index < 2000; index += 1) window.side.add({text: ' word', tokens: 1,"
        " seconds: index, k: [[1, 2]], entropy: [[0.5, 0.6]], avg_k: 1.5, compute_saved_ratio: 0.25, variant: null});"
        " })()"
    )
    browser.until("document.querySelector('.avg-k').innerText.startsWith('1.50')")
    assert layouts() - before < 100
    assert (
        browser.evaluate(
            "window.side.answer.scrollHeight - window.side.answer.scrollTop - window.side.answer.clientHeight"
        )
        < 2
    )


def test_what_the_server_does_not_say_is_not_shown_and_what_a_request_followed_is(browser: Browser) -> None:
    _side(browser, ["full"])
    piece = (
        "{text: ' word', tokens: 1, seconds: 1, k: [[1, 2]], entropy: [[0.5, 0.6]], avg_k: 1.5,"
        " compute_saved_ratio: 0.25, variant: null"
    )
    browser.evaluate(f"window.side.add({piece}, avg_reads: null, reads_per_token: null, followed: null}})")
    browser.until("document.querySelector('.avg-k').innerText.startsWith('1.50')")
    assert not browser.evaluate("document.querySelector('.reads').checkVisibility()")
    assert not browser.evaluate("document.querySelector('.followed').checkVisibility()")
    browser.evaluate(
        f"window.side.add({piece}, avg_reads: 4, reads_per_token: 1.25, followed: {{full: 3, '<b>': 4}}}})"
    )
    browser.until("document.querySelector('.reads').innerText.startsWith('1.25')")
    assert browser.text(".followed") == "By the load it followed full (3 tokens), <b> (4 tokens)."


def test_any_name_of_a_policy_can_be_chosen_and_read(browser: Browser) -> None:
    names = ["full", " ", 'a"b\\c\nd', "<b>&\u202e"]
    _side(browser, names)
    options = browser.evaluate("Array.from(window.side.policy.options, (option) => [option.value, option.textContent])")
    assert options == [
        ["full", "full (default)"],
        [" ", " "],
        ['a"b\\c\nd', 'a"b\\c\u21b5d'],
        ["<b>&\u202e", "<b>&U+202E"],
        ["", "the server\u2019s choice"],
    ]


def test_a_browser_that_goes_back_shows_what_the_form_says(browser: Browser) -> None:
    browser.click("#compare")
    browser.call("Page.navigate", url="about:blank")
    browser.until("location.href === 'about:blank'")
    history = browser.call("Page.getNavigationHistory")
    back = history["entries"][history["currentIndex"] - 1]["id"]
    browser.call("Page.navigateToHistoryEntry", entryId=back)
    browser.until("location.pathname === '/' && document.readyState === 'complete'")
    browser.until(IDLE)
    count = "document.querySelectorAll('.side').length - document.querySelector('#compare').checked"
    browser.until(f"document.querySelector('#compare').checked && {count} === 1")
    browser.click("#compare")


def _side(browser: Browser, policies: list[str]) -> None:
    """Put a side of its own onto the page, as `window.side`, of a server with these policies."""
    engine = {"policies": policies, "default_policy": "full", "num_experts": 8, "num_experts_per_tok": 2}
    browser.evaluate(
        "import('/static/side.js').then(({Side}) => {"
        " window.side = new Side('Own', document.querySelector('#side-template'));"
        f" window.side.setEngine({json.dumps(engine)});"
        " document.querySelector('#sides').replaceChildren(window.side.root); })"
    )
