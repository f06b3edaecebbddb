"""The audit's page as text: what it says, that text stays text, that equal reports give equal pages; and the layout."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from graphlib import CycleError
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import audits
from vzrepro.base import html
from vzrepro.base.html import elide, readable
from vzrepro.proof.audit.model import REPEAT, AuditReport, Cause, Cell, Verdict
from vzrepro.proof.audit.page import render
from vzrepro.proof.audit.page.layout import Box, Layout, layered

_EMPTY = {"col", "input", "link", "meta", "path", "rect", "use"}


class Page(HTMLParser):
    """Collects what a page has, and fails where elements do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.inside: dict[str, str] = {"style": "", "script": ""}
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(name)
        self.attributes |= {key for key, _ in attrs}
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if name == "a":
            self.links.append(str(found["href"]))
        if name not in _EMPTY:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        if name not in _EMPTY:
            assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def said(report: AuditReport) -> str:
    """The verdict: all between the stamp and the counts."""
    head = render(report).partition('id="verdict"')[2].partition("</div>")[0]
    return " ".join(re.sub(r"<[^>]+>", "", head.partition(">")[2]).split())


def test_the_verdict_names_the_guilty_and_their_axes() -> None:
    sentence = said(audits.sample())
    assert sentence.startswith(
        "Not reproducible10 of 17 nodes reproduced. kernel-container-config (host-name), guest-agent (build-path and "
        "cores), initramfs (clock) and vz-probe (randomness) are to blame. container-bundle is built with what differs."
    )
    assert "busybox did not build again." in sentence
    assert "container-probes could not be judged." in sentence
    assert "probe-disks was not tested." in sentence
    assert "https://mirror.example/vz has other bytes for 1 node." in sentence


def test_the_verdict_of_a_clean_audit_says_what_could_not_be_varied() -> None:
    assert said(audits.reproduced()) == (
        "Reproducible17 of 17 nodes reproduced. Every byte came out the same again on 19 axes; runtime and randomness "
        "could not be varied."
    )


def test_one_origin_and_an_interrupted_audit() -> None:
    report = audits.sample()
    guilty = next(node for node in report.nodes if node.target == "initramfs")
    clean = audits.reproduced(report)
    nodes = tuple(guilty if node.drv_hash == guilty.drv_hash else node for node in clean.nodes)
    sentence = said(replace(clean, nodes=nodes, complete=False))
    assert "initramfs is to blame: its output changes with clock. container-bundle is built with it." in sentence
    assert "The audit was interrupted" in sentence


def test_a_difference_without_a_cause_is_blamed_on_no_axis() -> None:
    report = audits.reproduced()
    first = next(node for node in report.nodes if node.kind == "sandbox")
    cells = {**first.cells, REPEAT: Cell(Verdict.DIFFERS, "other bytes came out")}
    changed = replace(first, verdict=Verdict.DIFFERS, cells=cells)
    nodes = tuple(changed if node.drv_hash == first.drv_hash else node for node in report.nodes)
    assert f"{first.target} is to blame: its output changes with nothing varied." in said(replace(report, nodes=nodes))


def test_quick_knows_no_axis_and_says_how_to_find_it() -> None:
    report = audits.sample()
    guilty = next(node for node in report.nodes if node.target == "initramfs")
    quick = replace(guilty, causes=(), cells={"clock": Cell(Verdict.INCONCLUSIVE, "without --quick it is told which")})
    clean = audits.reproduced(report)
    nodes = tuple(quick if node.drv_hash == guilty.drv_hash else node for node in clean.nodes)
    html = render(replace(clean, nodes=nodes, explanations=report.explanations))
    assert "initramfs is to blame: its output changes with an axis that is not known yet." in Page(html).text
    assert "Find the axis: vzrepro audit initramfs" in Page(html).text
    assert ">vzrepro audit initramfs</code>" in html
    # What was seen in the bytes is told all the same.
    assert html.count("write SOURCE_DATE_EPOCH as the modification time") == 2
    assert '<span class="brief">with nothing varied' not in html


def test_one_fix_for_two_axes_is_said_once() -> None:
    report = audits.sample()
    guess = audits.CPIO_TIMES.guesses[0]
    causes = tuple(Cause(axis, replace(guess, evidence=axis), audits.CPIO_TIMES.id) for axis in ("clock", "time-zone"))
    nodes = tuple(replace(node, causes=causes) if node.target == "initramfs" else node for node in report.nodes)
    cards = render(replace(report, nodes=nodes)).partition("What to do")[2].partition("</ol>")[0]
    assert cards.count(guess.fix) == 1
    assert '<span class="seen">time-zone</span>' in cards


def test_many_things_to_do_are_folded() -> None:
    report = audits.large(30)
    lost = tuple(
        replace(node, verdict=Verdict.INCONCLUSIVE) if number < 25 else node for number, node in enumerate(report.nodes)
    )
    assert "<summary>17 more</summary>" in render(replace(report, nodes=lost))
    assert "more</summary>" not in render(report)


def test_commands_to_copy_are_quoted_for_a_shell() -> None:
    report = audits.sample()
    nodes = tuple(replace(node, target="a; rm -rf ~") if node.target == "busybox" else node for node in report.nodes)
    assert "vzrepro audit 'a; rm -rf ~' --axes memory --fresh" in Page(render(replace(report, nodes=nodes))).text


@pytest.mark.parametrize("report", [audits.sample, audits.reproduced, audits.hostile], ids=lambda make: make.__name__)
def test_elements_nest_and_links_lead_somewhere(report: object) -> None:
    page = Page(render(report()))  # type: ignore[operator]
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)


def test_hostile_texts_add_no_element_and_no_attribute() -> None:
    plain, hostile = Page(render(audits.sample())), Page(render(audits.hostile()))
    assert hostile.names == plain.names
    assert hostile.attributes == plain.attributes
    assert hostile.inside == plain.inside
    assert "<script>document.title='owned'</script>" in hostile.text
    assert "\\x1b[2Jred\\x07\\x00nul" in hostile.text
    assert "\\u202etxt.exe" in hostile.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]", hostile.text)
    render(audits.hostile()).encode()


def test_equal_reports_give_equal_pages() -> None:
    report = audits.sample()
    page = render(report)
    assert page == render(report)
    assert page == render(AuditReport.parse(json.dumps(report.document()).encode(), "here"))


def test_the_policy_allows_this_style_and_this_script_only() -> None:
    html = render(audits.sample())
    page = Page(html)
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert found
    policy = unescape(found[1])
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.inside[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    # Neither would work under that policy.
    assert not {key for key in page.attributes if key == "style" or key.startswith("on")}


def test_an_empty_audit_has_a_page() -> None:
    report = replace(audits.sample(), nodes=(), against=(), history=(), explanations={}, axes=())
    assert "0 of 0 nodes reproduced." in said(report)
    Page(render(report))


def test_nodes_of_the_same_name_have_names_of_their_own() -> None:
    page = Page(render(audits.sample()))
    assert {"node/files-probes", "node/files-probes~2", "node/files-probes~5"} <= set(page.ids)


def test_text_is_escaped_and_markup_is_not() -> None:
    environment = html.template("vzrepro.proof.audit.page", "parts.html", {}).environment
    found = environment.from_string('<p title="{{ a }}">\n  {{ b }}{{ c }}{{ d }}</p>')
    assert found.render(a='"', b="<b>", c=html.Markup("<i>x</i>"), d=None) == '<p title="&#34;">&lt;b&gt;<i>x</i></p>'
    assert readable("a" * 4001 + "\nb") == "a" * 4000 + " … 1 characters more\nb"


def test_names_are_cut_in_their_middle() -> None:
    assert elide("kernel-container-hardening", 26) == "kernel-container-hardening"
    assert elide("kernel-container-hardening", 11) == "kerne…ening"
    assert len(elide("x" * 500, 28)) == 28


# --- layout -------------------------------------------------------------------------------------------------------


def boxes(count: int) -> list[Box]:
    return [Box(str(number), 100 + number % 3 * 20, 46 if number % 4 else 26) for number in range(count)]


def overlaps(found: Layout, placed: Sequence[Box]) -> list[tuple[str, str]]:
    def apart(a: Box, b: Box) -> bool:
        (ax, ay), (bx, by) = found.corners[a.key], found.corners[b.key]
        return ax + a.width <= bx or bx + b.width <= ax or ay + a.height <= by or by + b.height <= ay

    return [(a.key, b.key) for a, b in itertools.combinations(placed, 2) if not apart(a, b)]


graphs = st.integers(1, 25).flatmap(
    lambda count: st.tuples(
        st.just(count),
        st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=60),
    )
)


@settings(max_examples=60)
@given(graphs)
def test_any_graph_flows_to_the_right_without_overlaps(graph: tuple[int, list[tuple[int, int]]]) -> None:
    count, pairs = graph
    edges = [(str(min(pair)), str(max(pair))) for pair in pairs if pair[0] != pair[1]]
    placed = boxes(count)
    found = layered(placed, edges)
    widths = {box.key: box.width for box in placed}
    assert not overlaps(found, placed)
    for source, user in edges:
        assert found.corners[source][0] + widths[source] < found.corners[user][0]
    for box in placed:
        x, y = found.corners[box.key]
        assert 0 <= x <= found.width - box.width
        assert -0.1 <= y <= found.height - box.height + 1
    # A rail reaches everyone who uses it, and nobody else.
    assert {(each.source, each.target) for each in found.segments if each.target} == set(edges)
    assert found == layered(placed, edges)


def test_a_tangle_that_can_be_drawn_without_crossings_is() -> None:
    placed = [Box(key, 50, 20) for key in "abcdef"]
    found = layered(placed, [("a", "f"), ("b", "e"), ("c", "d")])
    order = [sorted(group, key=lambda key: found.corners[key][1]) for group in ("abc", "def")]
    assert [dict(zip("abc", "fed", strict=True))[key] for key in order[0]] == order[1]


def test_users_of_one_input_share_its_rail() -> None:
    placed = [Box(key, 50, 20) for key in "abcd"]
    found = layered(placed, [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("a", "c")])
    # To b; on to the columns of b and c; from there to c and to d.
    assert len([each for each in found.segments if each.source == "a"]) == 5


def test_edges_to_strangers_are_left_out_and_circles_refused() -> None:
    placed = [Box(key, 50, 20) for key in "ab"]
    assert layered(placed, [("a", "x"), ("x", "b")]).segments == ()
    assert layered([], []) == Layout(0, 0, {}, ())
    with pytest.raises(CycleError):
        layered(placed, [("a", "b"), ("b", "a")])


def test_a_large_graph_stays_within_bounds() -> None:
    report = audits.large(150)
    placed = [Box(node.drv_hash, 128, 46) for node in report.nodes]
    found = layered(placed, [(drv, node.drv_hash) for node in report.nodes for drv in node.inputs.values()])
    assert not overlaps(found, placed)
    assert found.width <= 12 * 180
    assert found.height <= 2500
