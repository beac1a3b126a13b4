"""How the kiosk's page looks: sizes, light and dark, contrast, what axe-core finds, and that it is never still."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from device.outputs.output import Phase
from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from tests.daemon.fake_worker import Clerk
from tests.device.kiosk_page import NEEDED, Page
from tests.waiting import wait

pytestmark = NEEDED

SIZES = [(1280, 800), (800, 480), (390, 844), (360, 640)]

AXE = "4.14.1"

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

ANSWER = """\
# It is warm

Some **bold**, *leaning* and `code`, and averylongwordthatdoesnotfitinanyrowofaphoneandhastobebrokensomewhere:

1. first
   - inner
2. second

> said

```python
print("a rather long line of code that does not fit in a phone's width at all")
```

| place | °C | a long heading of a column | another one of those |
|---|---|---|---|
| soil | 21.75 | 1 | 2 |
"""

CLIPPED = """
return [...document.querySelectorAll('body *')].filter(each => {
  const box = each.getBoundingClientRect();
  return each.checkVisibility() && box.width && (box.right > innerWidth + 0.5 || box.left < -0.5)
    && !each.closest('#bar') && !each.closest('svg');
}).map(each => each.outerHTML.slice(0, 80));
"""

CONTRAST = """
const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = colour => colour.slice(0, 3).map(c => linear(c / 255))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
function paper(each) {
  for (; each; each = each.parentElement) {
    const found = numbers(getComputedStyle(each).backgroundColor);
    if (found.length < 4 || found[3] === 1) return found;
  }
  return [255, 255, 255];
}
function ratio(ink, back) {
  const [low, high] = [light(ink), light(back)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
const seen = [];
for (const each of document.querySelectorAll('body *')) {
  const own = [...each.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
  if (!own || !each.checkVisibility()) continue;
  const style = getComputedStyle(each);
  const ink = each instanceof SVGElement ? style.fill : style.color;
  seen.push([each.outerHTML.slice(0, 60), ratio(numbers(ink), paper(each))]);
}
const field = document.getElementById('text');
if (field) seen.push(['placeholder', ratio(numbers(getComputedStyle(field, '::placeholder').color), paper(field))]);
return seen;
"""
"""Each text with the contrast between it and what is behind it."""


@pytest.fixture(scope="module")
def axe(request: pytest.FixtureRequest) -> str:
    """axe-core's script, from npm; it is kept in pytest's cache."""
    folder = Path(request.config.cache.mkdir("axe-core"))
    script = folder / "node_modules/axe-core/axe.min.js"
    package = folder / "node_modules/axe-core/package.json"
    if not package.exists() or json.loads(package.read_text("utf-8"))["version"] != AXE:
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("needs npm, which brings axe-core")
        command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", f"axe-core@{AXE}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm did not bring axe-core: {done.stderr.strip()[-200:]}")
    return script.read_text("utf-8")


def assess(page: Page, axe: str, what: str) -> None:
    """Nothing is clipped, every text is read well, and axe-core has nothing to say."""
    assert page.run("return document.documentElement.scrollWidth <= innerWidth"), what
    assert page.run("return innerWidth") in {width for width, _ in SIZES}
    assert page.run(CLIPPED) == [], what
    seen = page.run(CONTRAST)
    assert len(seen) > 3
    assert [each for each in seen if each[1] < 4.5] == [], what  # WCAG 2.2, 1.4.3
    page.run(axe)
    found: list[dict[str, Any]] = page.browser.execute_async_script(
        "const done = arguments[1]; axe.run(document, {runOnly: arguments[0]}).then(r => done(r.violations))", RULES
    )
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found] == [], what


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_nothing_is_clipped_and_all_is_readable(
    size: tuple[int, int], scheme: str, page: Page, jobs: Jobs, axe: str
) -> None:
    page.resize(*size)
    page.prefer(scheme)
    wait(lambda: page.text("#state") == "Ready" and page.all("#presets button"))
    assess(page, axe, "at home")
    page.ask("A question that is long enough to need more than one row on the screen of a telephone?")
    wait(lambda: jobs.waiting)
    job = jobs.take(1)
    assert job is not None
    jobs.progress(job, 7, 28, 130 << 20)
    wait(lambda: "layer 7" in page.text(".note"))
    assess(page, axe, "while it reads")
    jobs.say(job, ANSWER)
    wait(lambda: page.all(".answer table"))
    jobs.finish(job, State.DONE, "length")
    wait(lambda: page.all(".on"))
    assess(page, axe, "answered")
    page.find("#board").click()
    assess(page, axe, "with the keyboard")
    page.find("#board").click()
    page.find("#more").click()
    wait(lambda: page.all("svg[aria-label^='Temperature']"))
    assess(page, axe, "with the drawer")


@pytest.mark.parametrize("phase", list(Phase))
def test_each_state_is_a_word_a_shape_and_a_colour(phase: Phase, page: Page, axe: str) -> None:
    wait(lambda: page.text("#state") == "Ready")
    page.resize(800, 480)
    others = set(Phase) - {phase}
    looks = {each: look(page, each) for each in [phase, *others]}
    for at, name in enumerate(("word", "colour", "shape")):
        assert looks[phase][at] not in {looks[each][at] for each in others}, name
    look(page, phase)
    assess(page, axe, phase)
    box = page.find("#state").size
    assert page.run("return parseFloat(getComputedStyle(document.getElementById('state')).fontSize)") >= 36, box


def look(page: Page, phase: Phase) -> tuple[str, str, str]:
    """What tells that it is in a phase."""
    page.appliance._entered(phase)
    wait(lambda: page.run("return document.body.dataset.phase") == phase)
    shapes = page.run(
        "return [...document.querySelectorAll('#face [data-for]')]"
        ".filter(e => getComputedStyle(e).display !== 'none').map(e => e.dataset.for)"
    )
    assert len(shapes) == 1
    return page.text("#state"), page.find("#band").value_of_css_property("background-color"), str(shapes[0])


def frames(page: Page) -> list[bytes]:
    """The page at each tenth of a second of its animations, as if time stood still between."""
    taken = []
    for tenth in range(10):
        page.run(
            "document.getAnimations().forEach(a => { if (a.effect.getTiming().iterations === Infinity) {"
            " a.pause(); a.currentTime = arguments[0]; } })",
            100 * tenth,
        )
        taken.append(page.find("#main").screenshot_as_png)
    return taken


@pytest.mark.parametrize("words", [0, 1])
def test_a_slow_model_never_leaves_the_page_still_for_a_second(words: int, page: Page, jobs: Jobs) -> None:
    """With no word or one, no event comes any more. In each second the page has two looks all the same."""
    clerk = Clerk(jobs, words=["A **word** "] * 9, paced=True)
    assert clerk.permits is not None
    page.ask("Why?")
    wait(lambda: page.text("#state") == "Thinking")
    if words:
        clerk.permits.release(words)
    wait(lambda: page.text(".answer").count("word") == words)
    page.run("for (let i = 0; i < 9999; i++) clearInterval(i)")  # so that nothing but the animations moves
    assert len(set(frames(page))) >= 2
    clerk.close()


def test_the_seconds_are_counted_until_the_first_word(page: Page, jobs: Jobs) -> None:
    page.ask("Why?")
    for second in range(3):
        wait(lambda s=second: page.text(".note").endswith(f" · {s} s"))  # type: ignore[misc]


HOSTILE = [
    '<img src="http://127.0.0.1:9/a.png" onerror="window.hit=1">', "<script>window.hit=1</script>",
    "<svg onload=window.hit=1>", '<iframe src="http://127.0.0.1:9/"></iframe>', "<style>body{display:none}</style>",
    '<details open ontoggle="window.hit=1">x</details>', "[click](javascript:window.hit=1)",
    "![picture](http://127.0.0.1:9/b.png)", "[far](http://example.org/)", '<a href="http://example.org/">away</a>',
    '<form action="/api/mute/on" method="post"><button>go</button></form>', "<math><mtext><style><img src=x>",
    '```"><img/src=x onerror=window.hit=1>\ncode\n```',
    "| <b>a</b> |\n|:-:|\n| <input autofocus onfocus=window.hit=1> |",
    '<div id="main" class="turn" style="position:fixed;inset:0">cover</div>',
    "<https://example.org>", "www.example.org",
]  # fmt: skip

ALLOWED = {
    "P", "BR", "STRONG", "EM", "DEL", "CODE", "PRE", "UL", "OL", "LI", "BLOCKQUOTE", "HR",
    "TABLE", "THEAD", "TBODY", "TR", "TH", "TD",
}  # fmt: skip


def test_an_answer_runs_nothing_and_fetches_nothing(page: Page, jobs: Jobs) -> None:
    clerk = Clerk(jobs, words=[text + "\n\n" for text in HOSTILE])
    page.ask("Be wicked.")
    wait(lambda: page.all("#again"))
    clerk.close()
    made = page.run(
        "return [...document.querySelectorAll('.answer *')].map(e => [e.tagName, [...e.attributes].map(a => a.name)])"
    )
    assert {tag for tag, _ in made} <= ALLOWED
    assert {name for _, names in made for name in names} <= {"start"}
    assert page.run("return window.hit") is None
    fetched = page.run("return performance.getEntriesByType('resource').map(e => new URL(e.name).host)")
    assert set(fetched) == {page.run("return location.host")}
    shown = page.text(".answer")
    for text in ('<img src="http://127.0.0.1:9/a.png"', "<script>window.hit=1</script>", "click", "picture", "far"):
        assert text in shown  # it is told what the model wrote


def test_the_sanitiser_alone_lets_nothing_through(page: Page) -> None:
    """Even if the parser passed HTML on: what comes out of it is sanitised."""
    page.run("marked.Marked = class { constructor() {} parse(text) { return text; } }")
    made = page.browser.execute_async_script(
        "const [texts, done] = arguments; import('/page/answer.js#anew').then(({ render }) => {"
        " const target = document.createElement('div'); document.body.append(target);"
        " render(target, texts.join(' '));"
        " const made = [...target.querySelectorAll('*')].map(e => [e.tagName, [...e.attributes].map(a => a.name)]);"
        " target.remove(); done(made); })",
        HOSTILE,
    )
    assert made and {tag for tag, _ in made} <= ALLOWED
    assert {name for _, names in made for name in names} <= {"start"}
    assert page.run("return window.hit") is None
