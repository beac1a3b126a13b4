"""The kiosk's page, clicked and typed at and touched, over a queue with a clerk."""

from __future__ import annotations

from contextlib import ExitStack, closing
from hashlib import sha256
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from gpiozero.pins.mock import MockFactory

from device.controls import Facts
from device.feed import MOST_PAGES
from device.kiosk import PAGE
from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from flashd.errors import Busy
from tests.daemon.fake_worker import Clerk, request
from tests.device.conftest import LAST
from tests.device.kiosk_page import NEEDED, Page
from tests.waiting import wait

pytestmark = NEEDED

SMALL = (800, 480)
"""The Raspberry Pi's own touch screen."""


def listen(page: Page) -> HTTPResponse:
    """The stream of what happens, as another page has it."""
    connection = HTTPConnection("127.0.0.1", urlsplit(page.browser.current_url).port, timeout=30)
    connection.request("GET", "/api/events")
    return connection.getresponse()


def test_a_preset_is_asked_by_touch(page: Page, clerk: Clerk) -> None:
    wait(lambda: len(page.all("#presets button")) == 2)
    assert page.text("#title") == "Greenhouse"
    assert [b.text for b in page.all("#presets button")] == ["Is it warm?", "<b>Bold?</b>"]
    page.all("#presets button")[0].click()
    wait(lambda: page.text(".answer") == "It is warm today.")
    assert page.text(".asked") == "You: Is it warm?"
    wait(lambda: page.all("#again"))
    page.find("#again").click()
    assert len(page.all("#presets button")) == 2
    assert not [e for e in page.browser.get_log("browser") if e["level"] == "SEVERE"]


def test_a_question_is_typed_and_the_talk_stays(page: Page, clerk: Clerk) -> None:
    for count, question in enumerate(("Why?", "And then?"), 1):
        wait(lambda: page.all("#ask"))
        page.ask(question)
        wait(lambda n=count: len(page.all(".turn:not([aria-busy])")) == n)  # type: ignore[misc]
    assert [e.text for e in page.all(".asked")] == ["You: Why?", "You: And then?"]
    assert [e.text for e in page.all(".answer")] == ["It is warm today."] * 2
    assert [t.content for t in clerk.answered[1].request.turns] == ["Why?", "It is warm today.", "And then?"]


@pytest.mark.parametrize("how", ["New talk", "left alone"])
def test_whoever_comes_next_begins_anew(how: str, page: Page, clerk: Clerk) -> None:
    page.ask("My secret?")
    wait(lambda: page.all("#again"))
    if how == "New talk":
        page.find("#again").click()
    else:
        page.run("const now = Date.now; Date.now = () => now() + 181000")
    wait(lambda: not page.all(".turn"))
    page.ask("Who are you?")
    wait(lambda: len(clerk.answered) == 2)
    assert [t.content for t in clerk.answered[1].request.turns] == ["Who are you?"]


def test_a_question_is_typed_by_touch_alone(page: Page, clerk: Clerk) -> None:
    page.resize(*SMALL)

    def key(name: str) -> None:
        page.touch(next(k for k in page.all("#keys button") if name in (k.text, k.get_attribute("aria-label"))))

    page.touch("#text")
    wait(lambda: len(page.all("#keys button")) > 30)
    page.run("const l = document.querySelector('#keys select'); l.value = 'de'; l.dispatchEvent(new Event('change'))")
    for name in ("Shift", "W", "h", "x", "Delete", "y", "Space", "ü", "?12", "!", ":", '"', "(", ")", "7",
                 "abc", "?"):  # fmt: skip
        key(name)
    assert page.find("#text").get_property("value") == 'Why ü!:"()7?'
    for each in page.all("button"):
        size, place = each.size, each.location
        assert min(size.values()) >= 44, (each.text, size)  # WCAG 2.2, 2.5.5
        assert place["x"] + size["width"] <= SMALL[0] and place["y"] + size["height"] <= SMALL[1], each.text
    key("Ask")
    wait(lambda: clerk.answered)
    assert clerk.answered[0].request.turns[0].content == 'Why ü!:"()7?'
    wait(lambda: not page.all("#keys button"))


def test_the_field_grows_with_what_is_written(page: Page) -> None:
    page.resize(1280, 800)
    before = page.find("#text").size["height"]
    page.run(
        "const t = document.getElementById('text'); t.value = 'a\\n'.repeat(3); t.dispatchEvent(new Event('input'))"
    )
    assert page.find("#text").size["height"] > 2 * before
    assert page.run("const t = document.getElementById('text'); return t.scrollHeight <= t.clientHeight")


def test_what_is_sensed_now_is_on_the_page(page: Page, tmp_path: Path) -> None:
    wait(lambda: page.text("#senses") == "soil heat 21.75 °C\nair unknown")
    thermometer = tmp_path / "bus/w1/devices/28-0123456789ab/w1_slave"
    thermometer.write_text("f8 ff 4b 46 7f ff 08 10 e8 : crc=e8 YES\nt=-500\n")
    wait(lambda: "soil heat -0.5 °C" in page.text("#senses"))


def test_a_long_answer_is_followed_to_its_end(page: Page, jobs: Jobs) -> None:
    page.resize(*SMALL)
    clerk = Clerk(jobs, words=["a row\n"] * 60)
    page.ask("talk")
    wait(lambda: page.text(".answer").count("row") == 60)
    wait(lambda: not page.all(".turn[aria-busy]"))
    left = page.run("const m = document.getElementById('main'); return m.scrollHeight - m.scrollTop - m.clientHeight")
    clerk.close()
    assert left < 80


def test_who_waits_is_told_why(page: Page, jobs: Jobs) -> None:
    for _ in range(2):
        jobs.submit(request(priority=9))
    page.ask("when?")
    wait(lambda: page.text(".note").startswith("Waiting: 2 questions are before this one · "))
    clerk = Clerk(jobs, paced=True)
    assert clerk.permits is not None
    clerk.permits.release(3)
    wait(lambda: page.text(".note").startswith("Waiting: 1 question is before this one · "))
    clerk.permits.release(3)
    wait(lambda: [j.request.source for j in jobs.running] == ["api"])
    (running,) = jobs.running
    jobs.progress(running, 7, 28, 130 << 20)
    wait(lambda: page.text(".note").startswith("Reading: layer 7 of 28, 130 MiB from the card · "))
    bar = page.find("#bar")
    assert (bar.get_attribute("aria-valuenow"), bar.get_attribute("aria-valuemax")) == ("7", "28")
    assert page.run("return new DOMMatrix(getComputedStyle(document.getElementById('done')).transform).a") <= 0.26
    clerk.close()


def test_an_answer_streams_and_is_stopped(page: Page, jobs: Jobs) -> None:
    clerk = Clerk(jobs, words=["word "] * 50, paced=True)
    assert clerk.permits is not None
    page.ask("talk")
    clerk.permits.release(2)
    wait(lambda: page.text(".answer") == "word word")
    page.find("#stop").click()
    wait(lambda: page.text(".note") == "You stopped it.")
    wait(lambda: not jobs.running)
    clerk.close()
    assert jobs.recent(1)[0].state == "cancelled"


def test_a_cut_answer_goes_on(page: Page, jobs: Jobs) -> None:
    page.ask("Tell me a tale.")
    wait(lambda: jobs.waiting)
    job = jobs.take(1)
    assert job is not None
    jobs.say(job, "Once upon a")
    jobs.finish(job, State.DONE, "length")
    wait(lambda: page.text(".note") == "The answer was cut short.")
    page.find(".on").click()
    wait(lambda: jobs.waiting)
    more = jobs.take(1)
    assert more is not None
    assert [t.content for t in more.request.turns] == ["Tell me a tale.", "Once upon a", "Go on."]
    assert not page.all(".on")
    jobs.finish(more, State.DONE, "stop")


# --- what others ask ------------------------------------------------------------------------------------------


def test_what_a_button_asks_and_is_answered_comes_by_itself(page: Page, clerk: Clerk, pins: MockFactory) -> None:
    wait(lambda: page.text("#state") == "Ready")
    pins.pin(17).drive_low()
    pins.pin(17).drive_high()
    wait(lambda: page.text(".asked") == "The button “front”: Say hello to the visitor.")
    wait(lambda: page.text(".answer") == "It is warm today.")
    wait(lambda: not page.all(".turn[aria-busy]"))
    assert page.run(
        "const r = document.querySelector('.turn').getBoundingClientRect(), m = document.getElementById('main');"
        "return r.bottom <= m.getBoundingClientRect().bottom + 1"
    )


def test_a_decision_is_shown_with_what_it_did(page: Page, jobs: Jobs) -> None:
    wait(lambda: page.text("#state") == "Ready")
    page.appliance.start("door")
    job = jobs.take(1)
    assert job is not None
    jobs.say(job, "yes")
    job.result.probabilities = {"yes": 0.91, "no": 0.09}
    jobs.finish(job, State.DONE, "stop")
    wait(lambda: page.text(".asked") == "The door: Should the light be on?")
    wait(lambda: page.text(".answer") == "yes")
    wait(lambda: page.text(".note").startswith("Decided"))
    assert page.text(".note") == "Decided: yes (yes 91 %, no 9 %). Pin 5 is switched on, for 4 seconds at most."


def test_what_a_person_asks_elsewhere_is_not_told(page: Page, jobs: Jobs) -> None:
    wait(lambda: page.text("#state") == "Ready")
    jobs.submit(request("my secret", source="serial:console"))
    job = jobs.take(1)
    assert job is not None
    jobs.say(job, "a secret answer")
    wait(lambda: page.text("#state") == "Answering")
    assert page.text("#doing") == "Somebody at the console “console”"
    with closing(listen(page)) as stream:
        heard = b""
        while b"console" not in heard:
            heard += stream.readline()
        jobs.say(job, "more of the secret")
        jobs.finish(job, State.DONE, "stop")
        while b"ended" not in heard:
            heard += stream.readline()
    assert b'"kind":"text"' in heard and b"secret" not in heard
    assert not page.all(".turn")


def test_an_answer_that_begins_anew_is_shown_once(page: Page, jobs: Jobs) -> None:
    wait(lambda: page.text("#state") == "Ready")
    page.appliance.start("front")
    job = jobs.take(1)
    assert job is not None
    jobs.say(job, "Hel")
    wait(lambda: page.text(".answer") == "Hel")
    jobs.put_back(job)
    wait(lambda: page.text(".answer") == "" and "more urgent" in page.text(".note"))
    again = jobs.take(1)
    assert again is not None
    jobs.say(again, "Hello.")
    wait(lambda: page.text(".answer") == "Hello.")
    jobs.finish(again, State.DONE, "stop")
    wait(lambda: not page.all(".turn[aria-busy]"))
    assert len(page.all(".turn")) == 1


def test_only_so_many_pages_listen_at_once(page: Page) -> None:
    wait(lambda: page.text("#state") == "Ready")
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(listen(page))) for _ in range(MOST_PAGES - 1)]
        assert {stream.status for stream in streams} == {200}
        with closing(listen(page)) as refused:
            assert refused.status == 429 and b"16 pages are open already" in refused.read()

    def has_place() -> bool:
        with closing(listen(page)) as stream:
            return stream.status == 200

    wait(has_place)


# --- what a failure is called ---------------------------------------------------------------------------------


def test_no_room_is_said_in_words(page: Page, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise Busy("no room")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "ask", full)
        page.ask("one too many")
        wait(lambda: page.text(".note.bad").startswith("Many questions are waiting. Please ask again in a moment."))
        assert "no room" in page.text(".note.bad small")


def test_a_question_waits_for_room(page: Page, jobs: Jobs) -> None:
    for _ in range(8):
        jobs.submit(request())
    page.ask("one too many")
    with closing(Clerk(jobs)) as clerk:
        wait(lambda: any(job.request.turns[-1].content == "one too many" for job in clerk.answered))


def test_a_machine_that_starts_again_is_called_so(page: Page) -> None:
    wait(lambda: page.text("#state") == "Ready")
    page.server.stop()
    page.server.close()
    wait(lambda: page.text("#state") == "Starting")
    page.ask("Are you there?")
    wait(lambda: page.text(".note.bad") == "The machine is starting again. Please ask once more in a moment.")


def test_a_failed_answer_is_a_sentence(page: Page, jobs: Jobs) -> None:
    page.ask("Why?")
    wait(lambda: jobs.waiting)
    job = jobs.take(1)
    assert job is not None
    jobs.finish(job, State.FAILED, "an error in flashd: OSError: 5")
    wait(lambda: page.text(".note.bad").startswith("Something went wrong in the machine. Please ask again."))
    assert page.text(".note.bad small") == "an error in flashd: OSError: 5"
    wait(lambda: page.text("#state") == "It failed")


# --- the drawer and the files ---------------------------------------------------------------------------------


def test_the_drawer_says_how_it_is_doing(page: Page, clerk: Clerk) -> None:
    page.find("#more").click()
    wait(lambda: "How fast it writes" in page.text("#figures"))
    shown = page.text("#figures").replace("\n", " ")
    for words in (
        "2.00 tokens a second", "Read from the card for each token 3.0 MiB", "Found in memory, so not read 25 %",
        "Temperature of the processor 48 °C", "Is it slowed down? the board does not say", "The model a model",
    ):  # fmt: skip
        assert words in shown, shown
    # the temperature is taken every two seconds; its axis goes from 0 to 50 °C, of which 48.3 is 96.6 %
    wait(lambda: page.all("svg[aria-label^='Temperature']"), 20)
    texts = [t.text for t in page.all("svg[aria-label^='Temperature'] text")]
    assert texts[:3] == ["50", "0", "°C"] and texts[3].endswith("s ago") and texts[4] == "now"
    height = float(
        page.run("return document.querySelector(\"svg[aria-label^='Temperature'] circle\").getAttribute('cy')")
    )
    assert abs((96 - height) / (96 - 20) - 0.966) < 0.01
    page.find("#mute").click()
    wait(lambda: page.appliance.muted and page.text("#state") == "Muted")
    page.find("#shut").click()
    assert not page.all("#drawer")


def test_a_decision_has_no_speed(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token is not written: what the drawer shows stays that of the answer before."""
    page.find("#more").click()
    wait(lambda: "2.00 tokens a second" in page.text("#figures"))
    decided = LAST | {"decode_tokens_per_second": 0.0, "tokens": 1.0, "seconds": 0.25}
    monkeypatch.setattr(page.appliance, "_facts", lambda: Facts(model={"name": "another model"}, last=decided))
    wait(lambda: "another model" in page.text("#figures"), 20)
    assert "2.00 tokens a second" in page.text("#figures")


def test_the_files_of_others_are_as_they_published_them() -> None:
    table = (PAGE / "vendor/README.md").read_text("utf-8")
    scripts = sorted((PAGE / "vendor").glob("*.js"))
    assert len(scripts) == 2
    for script in scripts:
        assert sha256(script.read_bytes()).hexdigest() in table, script.name
        assert script.with_name(script.name.split(".")[0] + ".LICENSE").exists()
