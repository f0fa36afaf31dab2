"""The HTML report in a real browser: it loads nothing, complains of nothing, sorts, filters, and obeys no model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser, find_browser
from report_runs import answered, chose, documents, record, said, scored, write_profile, write_run

from qwen_eval.core import Metric
from qwen_eval.report.__main__ import main
from qwen_eval.report.formulas import ELEMENTS, formulas
from qwen_eval.report.samples import _share, elided, embeddable

HOSTILE = "<script>window.hacked = 1</script></textarea></script><img src=x onerror='window.hacked=2'><!-- &amp; ]]>"
CHINESE = "设 $\\frac{a}{b} \\neq \\sqrt{2}$，求 \\(x\\) 的值。𠮷"
needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("html")
    runs = root / "runs"
    first = answered([1.0, 0.0, 1.0, 1.0] * 30)
    first[3] = record("q3", said(HOSTILE), 1.0, extracted=HOSTILE, prompt=CHINESE + HOSTILE, group=HOSTILE)
    first[4] = record("q4", said("…", reason="length"), 0.0, flags=("truncated",), prompt=CHINESE + "\ud83d tail")
    second = answered([1.0, 0.0, 1.0, 0.0] * 30)
    second[3] = record("q3", said(HOSTILE), 0.0, extracted="B", prompt=CHINESE + HOSTILE, group=HOSTILE)
    second[4] = record("q4", said("…"), 0.0, prompt=CHINESE + "\ud83d tail")
    write_run(runs, first)
    write_run(runs, second, model="qwen-7b-chat-int4", quant="gptq-int4")
    write_run(
        runs, [record(f"c{i}", chose(i % 4), float(i % 2)) for i in range(9)], task="mmlu", model=f"m {HOSTILE}"[:40]
    )
    lengths = {f"ppl/{n}": Metric(value=5 - n / 4096, n=n, kind="ppl", low=2, high=6) for n in (1024, 2048, 4096)}
    write_run(runs, documents([2.0, 2.1, 2.2]), task="long_ppl", metrics={"ppl": lengths["ppl/4096"], **lengths})
    needles = [
        record(f"n{n}-{d}", said("x"), float(d != 50), values={"length": n, "depth": d})
        for n in (1024, 4096)
        for d in (0, 50, 100)
    ]
    write_run(runs, needles, task="needle")
    write_profile(runs, [40.0, 41.0])
    page = root / "report.html"
    assert main([f"runs={runs}", f"out={page}"]) == 0
    return page


@pytest.fixture(scope="module")
def page(report: Path) -> Iterator[Page]:
    if find_browser() is None:
        pytest.skip("no Chromium on this machine")
    with browser() as opened:
        yield opened


def click(page: Page, selector: str, index: int = 0) -> None:
    page.js(f"document.querySelectorAll({json.dumps(selector)})[{index}].click()")


def put(page: Page, selector: str, value: str, event: str = "input") -> None:
    """Set a control's value as a user would: the page hears of it."""
    page.js(
        f"(() => {{ const box = document.querySelector({json.dumps(selector)}); box.value = {json.dumps(value)}; "
        f"box.dispatchEvent(new Event('{event}', {{ bubbles: true }})); }})()"
    )


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((x) => x.textContent)")
    return found


def test_nothing_is_fetched_and_nothing_complains(report: Path, page: Page) -> None:
    for dark in (False, True):
        page.open(report, dark=dark)
        assert page.requests == [report.resolve().as_uri()]
        assert page.complaints == []
    assert page.js("getComputedStyle(document.body).backgroundColor") != "rgb(246, 247, 249)"
    click(page, "#theme")
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"


def test_what_a_model_wrote_is_text(report: Path, page: Page) -> None:
    page.open(report)
    found = page.js("document.querySelectorAll('.row').length")
    assert found > 0
    page.js("[...document.querySelectorAll('.row')].find((x) => x.textContent.includes('q3')).click()")
    shown = texts(page, ".detail pre")
    assert shown[0] == CHINESE + HOSTILE
    assert shown[1] == HOSTILE
    assert page.js("window.hacked === undefined")
    assert page.js("document.querySelectorAll('img, textarea, iframe').length") == 0
    assert page.js("document.scripts.length") == 2
    assert page.complaints == []


def test_tables_sort_by_value_and_filter_by_words(report: Path, page: Page) -> None:
    page.open(report)
    heads = texts(page, "#runs th button")
    column = heads.index("score")
    values = f"[...document.querySelectorAll('#runs tbody tr')].map((r) => r.children[{column}].dataset.v)"
    click(page, "#runs th", column)
    down = [float(v) for v in page.js(values) if v is not None]
    assert down == sorted(down, reverse=True)
    click(page, "#runs th", column)
    up = [float(v) for v in page.js(values) if v is not None]
    assert up == sorted(up)
    assert page.js(f"document.querySelectorAll('#runs th')[{column}].getAttribute('aria-sort')") == "ascending"
    put(page, "#runs .filter", "gsm8k int4")
    shown = page.js(
        "[...document.querySelectorAll('#runs tbody tr')].filter((r) => !r.hidden).map((r) => r.textContent)"
    )
    assert len(shown) == 1
    assert "Int4" in shown[0]


def choose(page: Page, label: str, begin: str) -> None:
    """Pick the option whose text begins so."""
    found = f"[...document.querySelector('select[aria-label=\"{label}\"]').options]"
    value = page.js(f"{found}.find((x) => x.textContent.startsWith({json.dumps(begin)})).value")
    put(page, f'select[aria-label="{label}"]', value, "change")


def settle(page: Page) -> None:
    page.js("new Promise((done) => setTimeout(done, 250))")


def test_samples_are_filtered_searched_and_compared(report: Path, page: Page) -> None:
    page.open(report)
    choose(page, "Run", "gsm8k · qwen-7b-chat BF16")
    click(page, "[data-filter=wrong]")
    assert texts(page, "[data-filter=wrong]") == ["wrong 31"]
    assert len(texts(page, ".row")) == 31
    click(page, "[data-filter=truncated]")
    assert texts(page, ".row .id") == ["q4"]
    choose(page, "Compare with", "against gsm8k · qwen-7b-chat-int4 Int4")
    assert texts(page, "[data-filter=gained]") == ["gained 30"]
    assert len(texts(page, ".sides > div")) == 2
    choose(page, "Run", "gsm8k · qwen-7b-chat-int4 Int4")
    assert texts(page, "[data-filter=lost]") == ["lost 30"]
    click(page, "[data-filter=all]")
    assert len(texts(page, ".row")) == 100
    put(page, ".search", "sqrt{2}")
    settle(page)
    assert set(texts(page, ".row .id")) == {"q3", "q4"}


def test_the_first_screen_says_the_verdict_with_margin_and_evidence(report: Path, page: Page) -> None:
    page.open(report, width=1440, height=900)
    line = page.js("document.querySelector('.verdict').textContent")
    assert "qwen-7b-chat-int4 Int4 against qwen-7b-chat BF16" in line
    assert "worse by more than 1.0 points" in line
    assert page.js("document.querySelector('.evidence').getBoundingClientRect().bottom") < 900
    assert dict(zip(texts(page, ".evidence th"), texts(page, ".evidence td")))["margin"] == "1.0 points"
    sections = page.js("[...document.querySelectorAll('main > section')].map((x) => x.id)")
    assert sections == ["verdicts", "plots", "samples", "tables"]
    assert page.js("document.querySelectorAll('.table[open]').length") == 0


def test_two_clicks_show_which_samples_got_worse_in_chinese(report: Path, page: Page) -> None:
    page.open(report)
    link = page.js("[...document.querySelectorAll('.evidence a')].find((x) => x.textContent === '30 lost').click()")
    assert link is None
    settle(page)
    assert len(texts(page, ".row")) == 30
    choose(page, "Language", "Chinese")
    assert texts(page, ".row .id") == ["q3"]
    assert "→ B" in texts(page, ".row .what")[0]
    assert [text.partition(":")[0] for text in texts(page, ".sides h4") if ":" in text] == ["Reference", "Candidate"]


def test_a_link_opens_its_sample(report: Path, page: Page) -> None:
    page.open(report)
    choose(page, "Run", "gsm8k · qwen-7b-chat-int4 Int4")
    click(page, "[data-filter=all]")
    page.js("[...document.querySelectorAll('.row')].find((x) => x.textContent.includes('q42')).click()")
    target = page.js("document.querySelector('.detail h3 a').getAttribute('href')")
    assert target == "#gsm8k.qwen-7b-chat-int4.default/q42?against=gsm8k.qwen-7b-chat.default"
    assert page.js("location.hash") == target
    page.open(report)
    page.js(f"location.hash = {json.dumps(target)}")
    settle(page)
    assert texts(page, ".detail h3") == ["q42"]
    assert len(texts(page, ".sides > div")) == 2
    page.js("location.hash = '#runs'")
    settle(page)
    assert page.js("document.getElementById('runs').open")
    page.js("location.hash = '#%E0%A4%A/%E0?show=constructor'")
    settle(page)
    assert page.complaints == []


def test_find_looks_in_all_runs(report: Path, page: Page) -> None:
    page.open(report)
    choose(page, "Run", "gsm8k · qwen-7b-chat BF16")
    click(page, "[data-filter=all]")
    put(page, ".search", "question: n1024-50")
    settle(page)
    assert texts(page, ".row") == []
    click(page, ".empty button")
    assert [text.partition(" (")[0] for text in texts(page, ".row .id")] == ["n1024-50"]


def test_a_phone_shows_the_answer_when_a_sample_is_tapped(report: Path, page: Page) -> None:
    page.open(report, width=390, height=800)
    shown = "getComputedStyle(document.querySelector('{}')).display !== 'none'"
    assert not page.js(shown.format(".detail"))
    click(page, ".row", 2)
    assert page.js(shown.format(".detail"))
    assert not page.js(shown.format(".list"))
    assert -10 < page.js("document.querySelector('.detail').getBoundingClientRect().top") < 200
    click(page, ".back")
    assert page.js(shown.format(".list"))


def test_the_tab_key_walks_the_page_in_its_order(report: Path, page: Page) -> None:
    page.open(report)
    seen = []
    where = "(document.activeElement.closest('main > section, header') ?? document.activeElement).id"
    for _ in range(45):
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        seen.append(page.js(where))
    order = [name for i, name in enumerate(seen) if i == 0 or name != seen[i - 1]]
    places = [name for name in order if name in ("verdicts", "plots", "samples", "tables")]
    assert [name for name in places if name != "plots"][:3] == ["verdicts", "samples", "tables"]


def test_formulas_are_drawn_when_asked_for(report: Path, page: Page) -> None:
    page.open(report)
    page.js("[...document.querySelectorAll('.row')].find((x) => x.textContent.includes('q3')).click()")
    assert page.js("document.querySelectorAll('math').length") == 0
    click(page, ".draw")
    assert texts(page, ".prompt math mfrac > *") == ["a", "b"]
    assert page.js("document.querySelector('.prompt math').namespaceURI") == "http://www.w3.org/1998/Math/MathML"
    assert page.js("document.querySelector('.prompt').textContent").endswith("的值。𠮷" + HOSTILE)
    click(page, ".draw")
    assert texts(page, ".prompt") == [CHINESE + HOSTILE]
    assert page.complaints == []


@pytest.mark.parametrize("text", [
    "It costs $5 and $6.", r"$\newcommand{\x}{\x\x}\x$", "$" + "{" * 200 + "$", r"$\frac{$",
    "\\(" * 50_000, "$x " * 50_000, "$" + "\\frac" * 60 + "$",
])  # fmt: skip
def test_what_is_no_formula_stays_as_it_was_written(text: str) -> None:
    assert formulas([text]) == {}


def test_a_formula_brings_no_element_or_attribute_of_its_own() -> None:
    (tree,) = formulas([r"$\text{<script>x</script>} = \href{javascript:1}{y}$"]).values()
    assert "javascript" not in json.dumps(tree)
    assert set(re.findall(r'\["(m?[a-z]+)", [\["]', json.dumps(tree))) <= ELEMENTS


def test_print_opens_what_is_folded(report: Path, page: Page) -> None:
    page.open(report)
    page.js("dispatchEvent(new Event('beforeprint'))")
    assert page.js("document.querySelectorAll('details:not([open])').length") == 0
    page.js("dispatchEvent(new Event('afterprint'))")
    assert page.js("document.querySelectorAll('.table[open]').length") == 0


def test_headers_stand_over_their_numbers(report: Path, page: Page) -> None:
    page.open(report)
    page.js("document.getElementById('runs').open = true")
    ends = page.js(
        "[...document.querySelectorAll('#runs th')].map((head, i) => { const range = document.createRange(); "
        "const end = (node) => { range.selectNodeContents(node); return range.getBoundingClientRect().right; }; "
        "const cell = [...document.querySelectorAll('#runs tbody tr')].map((r) => r.children[i])"
        ".find((c) => c.dataset.v !== undefined); "
        "return cell ? [end(head.querySelector('button')), end(cell)] : null; }).filter(Boolean)"
    )
    assert ends
    assert all(abs(head - cell) < 1.5 for head, cell in ends)


def test_a_compare_page_and_a_gate_page_show_what_changed(page: Page, tmp_path: Path) -> None:
    before = write_run(tmp_path / "a", answered([1.0] * 40))
    after = write_run(tmp_path / "b", answered([0.0] * 10 + [1.0] * 30))
    assert main([f"compare={before},{after}", f"out={tmp_path / 'compare.html'}"]) == 0
    assert main([f"accept={before}", f"gate={tmp_path / 'base'}"]) == 0
    assert main([f"gate={tmp_path / 'base'}", f"runs={tmp_path / 'b'}", f"out={tmp_path / 'gate.html'}"]) == 1
    for name in ("compare", "gate"):
        page.open(tmp_path / f"{name}.html")
        assert texts(page, "[data-filter=lost]") == ["lost 10"]
        assert texts(page, ".row .what")[0] == "A → B · gold A"
        assert "10 lost" in texts(page, ".evidence a")
        assert len(texts(page, ".sides > div")) == 2
        assert page.complaints == []


def test_plots_are_there_and_the_phone_needs_no_sideways_scroll(report: Path, page: Page, tmp_path: Path) -> None:
    page.open(report, width=390, height=800)
    titles = texts(page, "figcaption")
    for title in ("Scores with 95 % intervals", "Perplexity by length", "Quality, speed and memory"):
        assert title in titles
    assert any(title.startswith("Needle") for title in titles)
    assert page.js("document.documentElement.scrollWidth") == 390
    page.screenshot(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 10_000


def test_twenty_thousand_samples_open_in_two_seconds(page: Page, tmp_path: Path) -> None:
    shots = "A worked example that every prompt begins with. " * 20
    rows = [
        record(f"s{i}", said(f"step {i} " * 25), float(i % 3 == 0), extracted=str(i), prompt=f"{shots}Question {i}?")
        for i in range(20_000)
    ]
    write_run(tmp_path / "runs", rows)
    out = tmp_path / "big.html"
    assert main([f"runs={tmp_path / 'runs'}", f"out={out}"]) == 0
    before = page.cpu_s()
    page.open(out)
    after = page.cpu_s()  # processor time: a busy test machine must not fail this
    assert (after - before if after > before else after) < 2.0
    assert texts(page, "[data-filter=all]") == ["all 20,000"]
    start = page.js(
        "(() => { const box = document.querySelector('.search'); box.value = 'question 19999?'; "
        "box.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    assert start is None
    before = page.cpu_s()
    settle(page)
    assert page.cpu_s() - before < 1.0
    assert texts(page, ".row .id") == ["s19999"]
    before = page.cpu_s()
    put(page, ".search", "step 1234 ")
    settle(page)
    assert page.cpu_s() - before < 0.2
    assert page.complaints == []


def test_json_in_a_script_element_cannot_leave_it() -> None:
    text = embeddable({"text": HOSTILE + "\u2028\ud800"})
    assert not re.search("[<>&\u2028\ud800]", text)
    assert json.loads(text)["text"] == HOSTILE + "\u2028\ufffd"


def test_long_prompts_keep_both_ends() -> None:
    text = "a" * 50_000 + "needle?"
    assert len(elided(text)) < 13_000
    assert elided(text).endswith("needle?")
    assert "38,007 characters left out" in elided(text)
    assert elided("short") == "short"


def test_no_address_is_in_the_page(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize(
    ("sizes", "room", "share"), [([10, 100, 100], 110, 50), ([10, 20], 1000, 20), ([50, 50], 10, 5), ([], 5, 5)]
)
def test_what_short_runs_leave_is_for_the_long_ones(sizes: list[int], room: int, share: int) -> None:
    assert _share(sizes, room) == share
    assert sum(min(size, share) for size in sizes) <= room


def test_samples_beyond_the_limit_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", answered([1.0] * 30))
    assert main([f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'x.html'}", "max_samples=10"]) == 0
    data: dict[str, Any] = json.loads(re.findall(r'id="data">(.*?)</script>', (tmp_path / "x.html").read_text())[0])
    assert data["left_out"] == 20
    assert len(data["runs"][0]["rows"]) == 10


def test_lengths_stand_from_short_to_long(tmp_path: Path) -> None:
    lengths = (2048, 256, 1024)
    for quant, shift in (("none", 0.0), ("gptq-int4", 0.2)):
        rows = [
            record(f"d{i}-{n}", scored((2 + shift + i / 100) * 50, 50), None, target=None, group=str(n))
            for i in range(8)
            for n in lengths
        ]
        metrics = {f"ppl/{n}": Metric(value=7.4, n=n, kind="ppl", higher_is_better=False) for n in lengths}
        write_run(tmp_path / "runs", rows, task="long_ppl", tag=quant, quant=quant, metrics=metrics)
    assert main([f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'x.html'}"]) == 0
    text = (tmp_path / "x.html").read_text()
    assert re.findall(r'data-label="task">long_ppl (\d+) tokens', text) == ["256", "1024", "2048"]
    assert "worse by more than the margin: long_ppl<" in text
