"""flashd doctor over the trees of a Pi 4 and a Pi 5, and the card's speed that it remembers."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from flashd.bundle.prefix import GAP_BYTES
from flashd.cli.commands.doctor import Finding, Roots, examine
from flashd.cli.main import main
from flashd.engine.paging import card_speed
from flashd.engine.paging.card import MOST_GAP_BYTES, extents, gap_bytes
from flashd.engine.paging.card_speed import CardSpeed, device_key, measure, remember, remembered
from flashd.errors import InputMissing
from flashd.system.paths import cache_folder

SLOW = CardSpeed(bandwidth=45e6, random_reads={4096: 2500.0, 16384: 1500.0, 65536: 500.0}, when=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flashd"


def tree(root: Path, files: dict[str, str], folders: tuple[str, ...] = ()) -> Roots:
    for name in ("proc", "sys", "dev", "run", *folders):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Roots(root / "proc", root / "sys", root / "dev", root / "run")


def disk_of(path: Path) -> str:
    number = path.stat().st_dev
    return f"sys/dev/block/{os.major(number)}:{os.minor(number)}"


def pi4(root: Path, card: Path) -> Roots:
    """Raspberry Pi OS as it comes: the memory cgroup off; a weak supply, and hot."""
    return tree(root, {
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.5\0",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n",
        "proc/meminfo": "MemTotal:         948000 kB\nMemFree: 1 kB\nMemAvailable:     612000 kB\n",
        "proc/sys/kernel/osrelease": "6.12.25+rpt-rpi-v8\n", "proc/uptime": "86400.00 1.00\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "sys/class/thermal/thermal_zone0/temp": "83200\n",
        f"{disk_of(card)}/stat": "1 2 3 4 5 6 8388608 8 9 10 11\n",
        "dev/ttyAMA0": "", "dev/serial0": "",
    })  # fmt: skip


def pi5(root: Path, card: Path) -> Roots:
    return tree(root, {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd crc32 atomics asimdhp cpuid asimdrdm asimddp\n",
        "proc/meminfo": "MemTotal:        8256000 kB\nMemAvailable:    7700000 kB\n",
        "proc/uptime": "864000.00 1.00\n", "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
        "sys/class/thermal/thermal_zone0/temp": "51000\n",
        f"{disk_of(card)}/stat": "1 2 3 4 5 6 8388608 8 9 10 11\n",
    }, ("run/systemd/system",))  # fmt: skip


def levels(found: list[Finding]) -> dict[str, str]:
    return {f.name: f.level for f in found}


def test_a_pi_4_as_it_comes(tiny_bundle: Path, tmp_path: Path) -> None:
    roots = pi4(tmp_path / "pi", tiny_bundle)
    remember(tiny_bundle, SLOW, roots.sys)
    found = {f.name: f for f in examine(tiny_bundle, roots)}
    assert found["board"].text.startswith("Raspberry Pi 4 Model B Rev 1.5,")
    assert found["processor"].text == "8-bit dot products no, products of matrices no"
    assert found["RAM"].text == "925 MiB, 597 available"
    assert found["memory cgroup"].level == "warn" and "cgroup_enable=memory" in found["memory cgroup"].advice
    assert found["supply"].level == "fail" and "cable" in found["supply"].advice
    assert found["temperature"].level == "warn" and found["temperature"].text == "83 °C"
    assert found["serial ports"].text == "serial0, ttyAMA0"
    assert found["written"].level == "warn" and found["written"].text.startswith("4096 MiB a day")
    assert found["systemd"].level == "warn" and found["bundle"].level == "ok"
    assert "45 MB/s in order" in found["card speed"].text and "2500 of 4 KiB" in found["card speed"].text
    assert all("\n" not in f.text for f in found.values())


def test_a_pi_5_in_order(tiny_bundle: Path, tmp_path: Path) -> None:
    roots = pi5(tmp_path / "pi", tiny_bundle)
    remember(tiny_bundle, SLOW, roots.sys)
    found = {f.name: f for f in examine(tiny_bundle, roots)}
    assert found["processor"].text == "8-bit dot products yes, products of matrices no"
    quiet = {
        "board",
        "processor",
        "RAM",
        "kernel",
        "memory cgroup",
        "supply",
        "temperature",
        "bundle",
        "written",
        "card speed",
    }
    assert {name for name in quiet if found[name].level != "ok"} == set()


@pytest.mark.parametrize(
    ("flags", "level"), [("0", "ok"), ("4", "warn"), ("50000", "warn"), ("1", "fail"), ("x", "ok")]
)
def test_flags_of_the_supply(tiny_bundle: Path, tmp_path: Path, flags: str, level: str) -> None:
    roots = pi5(tmp_path / "pi", tiny_bundle)
    (roots.sys / "devices/platform/soc/soc:firmware/get_throttled").write_text(flags)
    remember(tiny_bundle, SLOW, roots.sys)
    assert levels(list(examine(tiny_bundle, roots)))["supply"] == level


@pytest.mark.parametrize(
    ("cpuinfo", "text"),
    [
        ("flags : sse avx2 avx_vnni\n", "8-bit dot products yes, products of matrices no"),
        ("flags : avx512_vnni amx_int8\nflags : avx2\n", "8-bit dot products yes, products of matrices yes"),
        ("Features : asimddp i8mm\n", "8-bit dot products yes, products of matrices yes"),
        ("model name : one that is silent\n", "it does not say which instructions it has"),
    ],
)
def test_instructions_of_the_processor(tiny_bundle: Path, tmp_path: Path, cpuinfo: str, text: str) -> None:
    roots = pi5(tmp_path / "pi", tiny_bundle)
    (roots.proc / "cpuinfo").write_text(cpuinfo)
    remember(tiny_bundle, SLOW, roots.sys)
    assert next(f.text for f in examine(tiny_bundle, roots) if f.name == "processor") == text


CARD = " 0 [Headphones     ]: bcm2835_headpho - bcm2835 Headphones\n                      bcm2835 Headphones\n"


@pytest.mark.parametrize(
    ("voice", "files", "finding"),
    [
        (
            "no-such-voice", {},
            ("fail", "no-such-voice is not installed", "sudo apt install no-such-voice"),
        ),
        (
            "sh", {"proc/asound/cards": "--- no soundcards ---\n"},
            (
                "fail", "speech is configured, and there is no sound card",
                "plug in a USB sound card or speaker, or write dtparam=audio=on into /boot/firmware/config.txt and"
                " reboot",
            ),
        ),
        (
            "sh", {"proc/asound/cards": CARD, "dev/snd/pcmC0D0c": ""},  # a microphone alone
            (
                "fail", "speech is configured, and no card plays",
                "plug in a USB sound card or speaker, or write dtparam=audio=on into /boot/firmware/config.txt and"
                " reboot",
            ),
        ),
        (
            "sh", {"proc/asound/cards": CARD, "dev/snd/pcmC0D0p": ""},
            ("ok", "bcm2835 Headphones, for sh", ""),
        ),
    ],
)  # fmt: skip
def test_sound_is_looked_at_if_something_is_to_speak(
    tmp_path: Path, voice: str, files: dict[str, str], finding: tuple[str, str, str]
) -> None:
    roots = tree(tmp_path, files)
    (found,) = [f for f in examine(tmp_path, roots, [voice]) if f.name == "sound"]
    assert (found.level, found.text, found.advice) == finding
    assert not [f for f in examine(tmp_path, roots) if f.name == "sound"]


@pytest.mark.parametrize(
    ("ears", "files", "finding"),
    [
        (["sh", "no-such"], {}, ("fail", "no-such is not installed", "sudo apt install no-such")),
        (["sh"], {"dev/snd/pcmC0D0p": ""}, ("fail", "speech is to be heard, and no sound card records", None)),
        (["sh"], {"proc/asound/cards": CARD, "dev/snd/pcmC0D0c": ""}, ("ok", "bcm2835 Headphones, for sh", "")),
    ],
)
def test_the_microphone_is_looked_at_if_something_is_to_hear(
    tmp_path: Path, ears: list[str], files: dict[str, str], finding: tuple[str, str, str | None]
) -> None:
    roots = tree(tmp_path, files)
    (found,) = [f for f in examine(tmp_path, roots, (), ears) if f.name == "microphone"]
    level, text, advice = finding
    assert (found.level, found.text) == (level, text) and advice in (found.advice, None)


def test_the_command_looks_at_the_sound_of_what_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "flashd.yaml"
    monkeypatch.setattr("flashd.cli.commands.doctor.CONFIG", config)
    config.write_text("outputs: [{kind: speech, command: [no-such-voice]}]")
    assert main(["doctor", "--card", str(tmp_path)]) == os.EX_CONFIG
    assert "fail  sound          no-such-voice is not installed -> sudo apt install" in capsys.readouterr().out
    config.write_text("hearing: {memory: 64M, microphone: [sh], recogniser: {kind: program, command: [no-ears]}}")
    assert main(["doctor", "--card", str(tmp_path)]) == os.EX_CONFIG
    assert "fail  microphone     no-ears is not installed -> sudo apt install" in capsys.readouterr().out
    config.write_text("outputs: []")
    main(["doctor", "--card", str(tmp_path)])
    assert "sound" not in capsys.readouterr().out


def test_a_damaged_bundle_fails_and_an_empty_board_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.flash").write_bytes(b"no bundle")
    found = {f.name: f for f in examine(tmp_path / "m.flash", tree(tmp_path / "none", {}))}
    assert found["bundle"].level == "fail" and found["RAM"].level == "warn"
    assert found["card speed"].level == "warn" and "too small" in found["card speed"].text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.flash").write_bytes(b"no bundle")
    assert main(["doctor", "--card", str(tmp_path / "m.flash")]) == os.EX_CONFIG
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fail  bundle") and " -> " in line for line in lines)
    main(["doctor", "--card", str(tmp_path / "m.flash"), "--json"])
    assert {"name", "level", "text", "advice"} == set(json.loads(capsys.readouterr().out)[0])


def test_a_card_is_measured_once(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(2 << 20))
    read: list[tuple[int, int]] = []
    real = os.preadv

    def counted(fd: int, buffers: list[memoryview], at: int) -> int:
        read.append((len(buffers[0]), at))
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", counted)
    try:
        speed = measure(big)
    except InputMissing as error:
        pytest.skip(str(error))
    sizes = {size for size, _ in read}
    assert sizes == {1 << 20, 4 << 10, 16 << 10, 64 << 10}
    assert sorted(at for size, at in read if size == 1 << 20) == [0, 0, 0, 1 << 20, 1 << 20, 1 << 20]
    assert all(at % 4096 == 0 and at + size <= 2 << 20 for size, at in read)
    assert speed.bandwidth > 0 and set(speed.random_reads) == set(card_speed.RANDOM_SIZES)
    assert remembered(big) is None
    remember(big, speed)
    assert remembered(big) == speed


@pytest.mark.parametrize(("rates", "depth"), [((100, 190, 300), 4), ((100, 190, 195), 2), ((100, 104, 104), 1)])
def test_a_card_has_the_reads_under_way_that_it_likes(rates: tuple[float, ...], depth: int) -> None:
    of_depth = list(zip(card_speed.DEPTHS, rates, strict=True))
    assert card_speed._preferred(of_depth) == (depth, dict(of_depth)[depth])


@pytest.mark.parametrize("depth", card_speed.DEPTHS)
def test_that_many_reads_are_under_way_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    big, all_of_them = tmp_path / "big", threading.Barrier(depth)
    big.write_bytes(bytes(8 << 20))

    def waits_for_the_others(fd: int, buffers: list[memoryview], at: int) -> int:
        if len(buffers[0]) == card_speed.SEQUENTIAL_READ:
            all_of_them.wait(10)
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", waits_for_the_others)
    monkeypatch.setattr(card_speed, "DEPTHS", (depth,))
    try:
        assert measure(big).depth == depth
    except InputMissing as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("rot", [b"{]", b'{"\xff":1}'])
def test_what_is_no_speed_is_measured_again(tmp_path: Path, cache: Path, rot: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / "cards.json").write_bytes(rot)
    assert remembered(tmp_path) is None
    remember(tmp_path, SLOW)
    assert remembered(tmp_path) == SLOW
    assert remembered(tmp_path / "none") is None


def test_a_card_is_known_by_its_own_number(tmp_path: Path) -> None:
    roots = tree(
        tmp_path / "pi", {f"{disk_of(tmp_path)}/x": "", "sys/dev/block/device/cid": "035344534333324785a1\n"}
    )
    assert device_key(tmp_path, roots.sys) == "035344534333324785a1"
    number = tmp_path.stat().st_dev
    assert device_key(tmp_path, tmp_path / "none") == f"{os.major(number)}:{os.minor(number)}"


def test_the_gap_that_reads_are_merged_across() -> None:
    assert gap_bytes(None) == GAP_BYTES
    assert gap_bytes(SLOW) == int(45e6 / 2500)
    for rate, expected in ((1.0, MOST_GAP_BYTES), (1e9, 4096), (0.0, GAP_BYTES)):
        assert gap_bytes(CardSpeed(bandwidth=45e6, random_reads={4096: rate}, when=0.0)) == expected
    assert len(extents(0, [0, 3], 4096)) == 1 and len(extents(0, [0, 3], 4096, 4096)) == 2


def test_who_may_write_the_service_s_cache_shares_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("flashd.system.paths.SERVICE", tmp_path / "service")
    assert cache_folder() == tmp_path / ".cache" / "flashd"
    (tmp_path / "service").mkdir()
    assert cache_folder() == tmp_path / "service" / "flashd"
