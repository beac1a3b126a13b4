"""How a run of the daemon begins and ends: alone on its spool, with a word, and with a record of what killed it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashd.daemon.last_run import death_file, note_death
from tests.daemon.running import PATIENCE, Running

CATCHES_SIGTERM = 1 << (signal.SIGTERM - 1)


def serve(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flashd", "serve", "--config", str(config)], stderr=subprocess.PIPE, text=True
    )


def wait_until_it_catches(process: subprocess.Popen[str]) -> None:
    """Until Python runs our code, a signal does what the kernel does with it."""
    until = time.monotonic() + PATIENCE
    while True:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":" in line
        )
        if int(status.get("SigCgt", "0"), 16) & CATCHES_SIGTERM:
            return
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 1.0])
def test_a_stop_soon_after_the_start_is_a_clean_end(seconds: float, tiny_bundle: Path, tmp_path: Path) -> None:
    with Running(tmp_path, tiny_bundle) as daemon:
        process = serve(daemon.config)
        wait_until_it_catches(process)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert (
        "stopped before it had begun" in said or "stopped before the model was loaded" in said or "stopping" in said
    )
    assert "Traceback" not in said


def test_a_second_daemon_on_a_spool_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with Running(tmp_path, tiny_bundle) as daemon:
        daemon.start()
        other = tmp_path / "other.yaml"
        other.write_text(daemon.config.read_text().replace("flashd.sock", "other.sock"))
        process = serve(other)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == os.EX_TEMPFAIL
        assert said == f"flashd: {tmp_path}/spool.db: another flashd serves from this spool; stop it first\n"
        with daemon.http() as http:
            assert http.get("/health").json() == {"status": "ok"}
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        daemon.start()  # nothing of the killed one is in the way
        assert daemon.stop() == 0


def test_what_is_kept_is_for_the_service_and_its_group_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with Running(tmp_path, tiny_bundle) as daemon:
            there = set(tmp_path.rglob("*"))
            daemon.start()
            with daemon.http() as http:
                body = {"messages": [{"role": "user", "content": "the thesis"}], "max_tokens": 2}
                assert http.post("/v1/chat/completions", json=body).status_code == 200
            made = {path for path in set(tmp_path.rglob("*")) - there if path.is_file()} - {daemon.log}
            assert len(made) >= 4, made  # the spool, its log, its lock, the record of a death
            assert {path.name: path.stat().st_mode & 0o007 for path in made} == {path.name: 0 for path in made}
            assert daemon.stop() == 0
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("number", "died"),
    [(signal.SIGSEGV, True), (signal.SIGABRT, True), (signal.SIGKILL, False), (signal.SIGTERM, False)],
)
def test_a_death_is_told_to_the_next_run_if_its_cause_was_inside(number: int, died: bool, tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib\n"
        "from flashd.daemon.last_run import watched\n"
        "with watched(pathlib.Path(sys.argv[1])) as last:\n"
        "    print(last.died)\n"
        "    if sys.argv[3]:\n"
        "        last.noted()\n"
        "    sys.stdout.flush()\n"
        "    os.kill(os.getpid(), int(sys.argv[2]))\n"
    )

    def run(number: int, noted: str = "noted") -> str:
        words = [sys.executable, "-c", program, str(tmp_path / "spool.db"), str(number), noted]
        return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout

    assert run(number) == "False\n"
    assert run(0, "") == f"{died}\n"  # a start that fails before it is in the spool
    assert run(0) == f"{died}\n"
    assert run(0) == "False\n"  # told once


@pytest.mark.parametrize(
    ("result", "told"), [("oom-kill", True), ("watchdog", True), ("signal", False), ("success", False)]
)
def test_systemd_tells_of_deaths_that_the_process_did_not_see(result: str, told: bool, tmp_path: Path) -> None:
    spool = tmp_path / "spool.db"
    note_death(spool, {"SERVICE_RESULT": result})
    assert not death_file(spool).exists()  # nothing ever ran here
    death_file(spool).touch()
    note_death(spool, {"SERVICE_RESULT": result})
    assert (result in death_file(spool).read_text()) is told
