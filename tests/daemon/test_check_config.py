"""check-config says of a configuration what the service would say, and the service obeys what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashd.bundle.reader import Bundle
from flashd.check_config import least_memory
from flashd.config.settings import parse
from flashd.engine.engine import plan_for
from flashd.serve import budget_of
from flashd.system.memory import MIB
from tests import tiny
from tests.waiting import wait

CONFIG = "\nmodel: {model}\nmemory: {memory}\ncontext: 256\n"
TOO_SMALL = r"50M is too small for tiny llama with a context of 256; the smallest that works is (\d+)M"


def flashd(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashd", *map(str, args)], capture_output=True, text=True, check=False
    )


def checked(config: Path, text: str) -> str:
    """What check-config says in its one line of an error."""
    config.write_text(text)
    done = flashd("check-config", config)
    assert done.returncode == os.EX_CONFIG and done.stdout == "", done
    assert done.stderr.startswith(f"flashd: {config}, ") and done.stderr.count("\n") == 1
    return done.stderr.removeprefix(f"flashd: {config}, ").strip()


def test_memory_that_is_too_small_is_refused_and_what_is_named_works(tiny_bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "flashd.yaml"
    text = CONFIG + f"api: {{{{socket: {tmp_path}/s}}}}\nspool: {{{{path: {tmp_path}/spool.db}}}}\n"
    said = checked(config, text.format(model=tiny_bundle, memory="50M"))
    found = re.fullmatch(rf"line 3: memory: {TOO_SMALL}", said)
    assert found is not None, said
    smallest = int(found[1])
    # a margin is in what is named, since libraries take a little more at one start than at another
    checked(config, text.format(model=tiny_bundle, memory=f"{smallest - 5}M"))
    config.write_text(text.format(model=tiny_bundle, memory=f"{smallest}M"))
    done = flashd("check-config", config)
    assert done.returncode == 0 and ": right; " in done.stdout, done
    assert serves(config, tmp_path)


def serves(config: Path, folder: Path) -> bool:
    """Whether the service gets ready with a configuration."""
    with (folder / "log").open("wb") as log:
        service = subprocess.Popen([sys.executable, "-m", "flashd", "serve", "--config", str(config)], stderr=log)
    try:
        wait(lambda: service.poll() is not None or b"ready: " in (folder / "log").read_bytes(), 180)
        return service.poll() is None
    finally:
        service.terminate()
        service.wait(60)


def test_the_service_names_no_option_that_it_lacks(tiny_bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "flashd.yaml"
    folder = f"api: {{socket: {tmp_path}/s}}\nspool: {{path: {tmp_path}/spool.db}}\n"
    config.write_text(CONFIG.format(model=tiny_bundle, memory="50M") + folder)
    done = flashd("serve", "--config", config)
    assert done.returncode == os.EX_CONFIG
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"(flashd|.*\]): memory: {TOO_SMALL}", last), done.stderr


def test_a_damaged_bundle_is_the_model_s_line(tmp_path: Path) -> None:
    (tmp_path / "m.flash").write_bytes(b"not a bundle")
    said = checked(tmp_path / "flashd.yaml", CONFIG.format(model=tmp_path / "m.flash", memory="1G"))
    assert said.startswith(f"line 2: model: {tmp_path}/m.flash: ")


def test_what_schemas_take_is_counted(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    config = tmp_path / "flashd.yaml"
    plain, schemas = (
        int(re.findall(r"(\d+)M$", checked(config, CONFIG.format(model=tiny_bundle, memory="50M") + more))[0])
        for more in ("", "schemas: true\n")
    )
    assert schemas > plain


def test_a_model_that_is_not_there_yet_is_a_warning(tmp_path: Path) -> None:
    config = tmp_path / "flashd.yaml"
    for model, words in (("/none.flash", "is not there"), (tiny.write(tmp_path / "m.gguf"), "flashd pack")):
        config.write_text(f"model: {model}\nmemory: 50M")
        done = flashd("check-config", config)
        assert done.returncode == 0 and words in done.stderr, done


def test_a_page_on_the_network_is_said_as_what_it_is(tmp_path: Path) -> None:
    config = tmp_path / "flashd.yaml"
    config.write_text("model: /none.flash\napi: {network: {port: 8088, code: 493817}}")
    done = flashd("check-config", config)
    words = "api.network: nothing is encrypted; others on the network can read the PIN, questions and answers"
    assert done.returncode == 0 and f"warning: {words}\n" in done.stderr and "493817" not in done.stderr


def test_what_hears_has_a_share_of_the_memory(tiny_bundle: Path) -> None:
    """As much as it is allowed to take, so that both together keep to the budget."""
    hears = parse("hearing: {memory: 160M, recogniser: {kind: program, command: [ears]}}")
    assert hears.hearing is not None and hears.hearing.held > 160 * MIB
    with Bundle(tiny_bundle) as bundle:
        plain, more = least_memory(parse(""), bundle), least_memory(hears, bundle)
        parts = plan_for(bundle, budget_of(hears, 1 << 40)).parts
    assert parts["hearing"] == hears.hearing.held
    assert abs(more - plain - hears.hearing.held) < 4 * MIB  # what this process holds varies
