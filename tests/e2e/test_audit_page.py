"""The audit's page in a real browser: at a desk and on a phone, light and dark, with and without its script."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests import audits
from vzrepro.proof.audit.page import render

pytestmark = pytest.mark.thorough  # needs chromium, which ./run test --all installs

DESK, PHONE = (1280, 800), (390, 844)
SIZES = pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])

OPEN_ALL = "for (const each of document.querySelectorAll('details')) each.open = true"
NEAR_THE_TOP = """([id, most]) => {
  const { y } = document.getElementById(id).getBoundingClientRect();
  return 0 < y && y < most;
}"""
OVERFLOW = "document.scrollingElement.scrollWidth - document.documentElement.clientWidth"

# For each text and sign that can be seen: its contrast with what is behind it (WCAG 2), the least per pair of colours.
CONTRASTS = """() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = ([r, g, b, a = 1], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
  const light = (colour) => {
    const [r, g, b] = colour.map((each) => {
      const part = each / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const rect = at.localName === "a" && at.querySelector(":scope > rect");
      const flag = element.classList.contains("flag-word") && at.querySelector(":scope > .flag");
      const fill = flag || rect ? getComputedStyle(flag || rect).fill : getComputedStyle(at).backgroundColor;
      const colour = parse(fill);
      layers.push(colour);
      if ((colour[3] ?? 1) === 1) break;
    }
    return layers.reduceRight((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const found = {};
  const note = (element, colour, kind) => {
    const back = behind(element);
    const value = ratio(over(parse(colour), back), back);
    const key = `${kind} ${colour} on ${back.map(Math.round)}`;
    found[key] ??= { key, kind, value, example: `${element.localName}.${element.getAttribute("class")}`,
                     text: element.textContent.trim().slice(0, 40) };
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const element = text.parentElement;
    if (!text.data.trim() || element.closest("script, title, .hidden, .skip") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    note(element, element.ownerSVGElement ? style.fill : style.color, "text");
  }
  for (const glyph of document.querySelectorAll(".glyph")) {
    if (glyph.checkVisibility()) note(glyph, getComputedStyle(glyph).stroke, "sign");
  }
  return Object.values(found);
}"""


@dataclass
class Visit:
    """A page that was opened, with all that it asked for and complained of."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def at(self, fragment: str) -> Any:
        """What a fragment names. After a click it is shown with the next `hashchange`: use `wait_for` then."""
        return self.page.locator(f"[id='{fragment}']")


Visitor = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "the Debian package chromium is not installed"
    with sync_playwright() as playwright:
        # Tests run as root in containers, where Chromium's own sandbox cannot be set up.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    for make in (audits.sample, audits.hostile, audits.large):
        made[make.__name__] = folder / f"{make.__name__}.html"
        made[make.__name__].write_text(render(make()), "utf-8")
    return made


@pytest.fixture
def visit(browser: Browser, pages: dict[str, Path]) -> Iterator[Visitor]:
    """Open a report's page: `visit("sample", PHONE, scheme="dark", script=False, fragment="…")`."""

    @contextmanager
    def opened(
        name: str, size: tuple[int, int] = DESK, scheme: Any = "light", script: bool = True, fragment: str = ""
    ) -> Iterator[Visit]:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, java_script_enabled=script
        )
        context.set_default_timeout(120_000)
        found = Visit(context.new_page())

        def heard(message: ConsoleMessage) -> None:
            found.complaints.append(f"{message.type}: {message.text}")

        context.on("request", lambda request: found.requests.append(request.url))
        found.page.on("console", heard)
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.on("dialog", lambda dialog: found.complaints.append(dialog.message))
        found.page.goto(pages[name].as_uri() + fragment)
        yield found
        context.close()

    with ExitStack() as stack:
        yield lambda *words, **more: stack.enter_context(opened(*words, **more))


@SIZES
@pytest.mark.parametrize("name", ["sample", "hostile", "large"])
def test_nothing_is_asked_for_nothing_fails_nothing_sticks_out(
    visit: Visitor, pages: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    found = visit(name, size)
    assert found.page.evaluate(OVERFLOW) <= 0
    if name != "large":  # would take minutes, and shows nothing new
        found.page.evaluate(OPEN_ALL)
    for switch in found.page.locator("#all").all():
        switch.check()
    assert found.page.evaluate(OVERFLOW) <= 0
    assert [url for url in found.requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert found.complaints == []


def test_the_policy_stops_what_somebody_might_add(visit: Visitor) -> None:
    found = visit("sample")
    tried = """(make) => new Promise((done) => {
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective), {once: true});
        const [name, key, value] = make;
        const element = document.createElement(name);
        element[key] = value;
        document.body.append(element);
        if (name === "link") { element.rel = "stylesheet"; element.href = "https://example.org/x.css"; }
    })"""
    for element, directive in (
        (["img", "src", "https://example.org/x.png"], "img-src"),
        (["script", "textContent", "document.title = 'owned'"], "script-src-elem"),
        (["style", "textContent", "* { color: red }"], "style-src-elem"),
        (["iframe", "src", "https://example.org/"], "frame-src"),
    ):
        assert found.page.evaluate(tried, element) == directive
    assert found.page.title() != "owned"


@SIZES
def test_a_click_on_a_cell_shows_its_evidence(visit: Visitor, size: tuple[int, int]) -> None:
    found = visit("sample", size)
    evidence = found.at("node/guest-agent/build-path")
    assert not evidence.is_visible()
    found.page.get_by_role("link", name="guest-agent, build-path: differs").click()
    evidence.wait_for()
    assert "/build → /b/4c1f/elsewhere" in evidence.inner_text()
    assert "took 1m21s" in evidence.inner_text()
    found.page.wait_for_function(NEAR_THE_TOP, arg=["node/guest-agent/build-path", size[1] / 2])
    # Closed again, the same link opens it again.
    found.page.evaluate("for (const each of document.querySelectorAll('details.node, details.axis')) each.open = false")
    found.page.get_by_role("link", name="guest-agent, build-path: differs").click()
    evidence.wait_for()
    evidence.get_by_role("link", name="where and why").click()
    difference = found.at("node/guest-agent/difference/e-path")
    difference.wait_for()
    assert "2f622f34 6331662f" in difference.inner_text()


def test_a_failed_build_shows_its_log(visit: Visitor) -> None:
    found = visit("sample", fragment="#node/busybox/memory")
    log = found.page.get_by_role("region", name="Log of rebuild busybox-memory")
    assert log.is_visible()
    assert log.inner_text().split("\n") == ["  CC      networking/tls.o", "  LD      busybox_unstripped", "Killed"]


def test_the_graph_leads_to_evidence(visit: Visitor) -> None:
    found = visit("sample")
    found.page.get_by_role("listitem", name="initramfs: differs: clock, to blame").click()
    found.at("node/initramfs").wait_for()
    assert "write SOURCE_DATE_EPOCH" in found.at("node/initramfs").inner_text()


def test_the_keyboard_alone_is_enough(visit: Visitor) -> None:
    found = visit("sample")
    page = found.page
    focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the evidence"
    stops = 0
    while not page.evaluate("Boolean(document.activeElement.closest('.matrix'))"):
        page.keyboard.press("Tab")
        stops += 1
        assert stops < 100
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or page.evaluate(
            "Boolean(document.activeElement.closest('.box'))"
        )
    assert page.evaluate(focused) == "kernel-container-config, repeat: reproduced"
    for key in ("ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate(focused).startswith("guest-agent, build-path: differs")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == "build-path"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Home")
    assert page.evaluate(focused) == "kernel-container-config"
    page.keyboard.press("End")
    assert page.evaluate(focused).startswith("kernel-container-config, randomness: untested")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.localName === 'summary'")
    assert found.at("node/guest-agent/build-path").is_visible()
    page.keyboard.press("Enter")
    assert not found.at("node/guest-agent/build-path").is_visible()


def test_tab_leaves_the_matrix_in_one_step(visit: Visitor) -> None:
    page = visit("sample").page
    page.locator(".matrix td.cell a").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    assert not page.evaluate("Boolean(document.activeElement.closest('.matrix'))")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "kernel-container-config, build-path"
    )


@SIZES
def test_what_a_screen_reader_gets(browser: Browser, visit: Visitor, size: tuple[int, int]) -> None:
    page = visit("sample", size).page
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    said: dict[str, set[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            said.setdefault(node["role"]["value"], set()).add(str(node.get("name", {}).get("value", "")))
    assert {"Every node on every axis", "Axes", "The toolchain images", "Earlier audits"} <= said["table"]
    assert {"clock", "What is varied", "Packages"} <= said["columnheader"]
    assert {"guest-agent differs", "busybox build failed"} <= said["rowheader"]
    assert "guest-agent, cores: differs. other bytes came out" in said["link"]
    assert {"Sections"} <= said["navigation"]
    assert {"Graph", "Evidence", "What to do"} <= said["heading"]
    assert "Show what is taken as it is: 6 images, 17 downloads, 21 local trees" in said["checkbox"]


@SIZES
@SCHEMES
def test_everything_can_be_read(visit: Visitor, size: tuple[int, int], scheme: str) -> None:
    page = visit("sample", size, scheme).page
    page.locator("#all").check()
    page.evaluate(OPEN_ALL)
    found = page.evaluate(CONTRASTS)
    assert len([each for each in found if each["kind"] == "text"]) >= 15
    assert len([each for each in found if each["kind"] == "sign"]) >= 6
    assert [each for each in found if each["value"] < (4.5 if each["kind"] == "text" else 3)] == []
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")


def test_colour_is_never_alone(visit: Visitor) -> None:
    page = visit("sample").page
    signs = page.evaluate(
        """Object.fromEntries([...document.querySelectorAll('td.cell:not(.empty)')].map((cell) =>
            [cell.className.split(' ')[1], cell.querySelector('use').getAttribute('href')]))"""
    )
    assert set(signs) == {"ok", "differs", "failed", "unsure", "untested", "held"}
    assert len(set(signs.values())) == len(signs)
    assert all(page.locator(sign).count() == 1 for sign in signs.values())


def test_the_matrix_scrolls_in_its_box_with_names_and_axes_in_place(visit: Visitor) -> None:
    page = visit("sample", PHONE).page
    box = page.locator("#cells")
    box.scroll_into_view_if_needed()
    name, axis = page.locator(".matrix tbody th").nth(1), page.locator(".matrix thead th").nth(5)
    left, top = name.bounding_box()["x"], axis.bounding_box()["y"]
    box.evaluate("box => box.scrollBy(300, 60)")
    assert box.evaluate("box => box.scrollLeft") == 300
    assert box.evaluate("box => box.scrollTop") == 60
    assert name.bounding_box()["x"] == pytest.approx(left, abs=1)
    assert axis.bounding_box()["y"] == pytest.approx(top, abs=1)
    cell = page.get_by_role("link", name="guest-agent, cores: differs").bounding_box()
    assert min(cell["width"], cell["height"]) >= 24


@SIZES
def test_it_can_be_read_without_its_script(visit: Visitor, size: tuple[int, int]) -> None:
    found = visit("sample", size, script=False)
    page = found.page
    assert page.get_by_text("10 of 17 nodes reproduced.").is_visible()
    assert not page.get_by_text("arrow keys move").is_visible()
    found.page.get_by_role("link", name="guest-agent, build-path: differs").click()
    assert found.at("node/guest-agent/build-path").is_visible()
    page.locator("details.node", has_text="initramfs").first.locator("summary").first.click()
    assert not page.get_by_role("link", name="image-c: toolchain image").first.is_visible()
    page.locator("#all").check()
    assert page.locator(".only-all").is_visible()
    assert not page.locator(".only-built").is_visible()
    assert page.locator(".matrix tbody.given").is_visible()


def test_a_fragment_of_a_folded_part_unfolds_it(visit: Visitor) -> None:
    found = visit("sample", fragment="#node/image-c/repeat")
    assert found.page.locator("#all").is_checked()
    assert found.at("node/image-c/repeat").is_visible()
    assert "taken as it is; --deep writes it again" in found.at("node/image-c/repeat").inner_text()


def test_hostile_texts_are_texts(visit: Visitor) -> None:
    found = visit("hostile")
    page = found.page
    page.evaluate(OPEN_ALL)
    page.wait_for_timeout(200)  # an onerror would have come
    assert "owned" not in page.title().split(":")[0]
    assert page.title().startswith("Not reproducible")
    assert page.locator("script").count() == 1
    assert page.locator("style").count() == 1
    assert page.locator("img, iframe, object, embed, form, base").count() == 0
    assert page.locator("h1").is_visible()
    assert page.get_by_role("region", name="Log of rebuild busybox-memory").inner_text().split("\n")[:2] == [
        "<script>document.title='owned'</script>",
        "<img src=x onerror=\"document.title='owned'\">",
    ]
    assert found.complaints == []


def test_a_command_is_copied(visit: Visitor) -> None:
    page = visit("sample").page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    command = "vzrepro audit busybox --axes memory --fresh"
    page.get_by_role("button", name=f"Copy: {command}").click()
    page.wait_for_function("command => navigator.clipboard.readText().then((text) => text === command)", arg=command)


def test_print_has_what_is_wrong_and_nothing_to_click(visit: Visitor) -> None:
    found = visit("sample", scheme="dark")
    page = found.page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert not page.locator(".copy").first.is_visible()
    assert page.get_by_text("/b/4c1f/elsewhere occurs 31 times").last.is_visible()
    assert found.at("node/busybox/memory").is_visible()
    assert not found.at("node/youki").is_visible()
    # A4 upright within its margins, in CSS pixels.
    page.set_viewport_size({"width": 718, "height": 1000})
    assert page.evaluate(OVERFLOW) <= 0
    assert page.pdf(format="A4").startswith(b"%PDF-")
