"""Sizes of memory, as people write them: on the command line and in flashd.yaml alike."""

from __future__ import annotations

import pytest

from flashd.cli.options import Plan
from flashd.cli.parser import parse as parse_command
from flashd.config.settings import parse as parse_settings
from flashd.errors import ConfigError, UsageError
from flashd.system.memory import parse_size

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * MIB),
        ("512MB", 512 * MIB), ("512 MB", 512 * MIB), ("512MiB", 512 * MIB), ("512 mib", 512 * MIB),
        ("1.5G", 1536 * MIB), ("1.5 GB", 1536 * MIB), ("2048K", 2 * MIB), ("0.5gb", 512 * MIB), ("1048576", MIB),
    ],
)  # fmt: skip
def test_a_size_means_the_same_everywhere(text: str, size: int) -> None:
    command = parse_command(["plan", "--memory", text])
    assert isinstance(command, Plan) and command.memory == size
    quoted = f'"{text}"' if text.isdigit() else text
    memory = parse_settings(f"memory: {quoted}").memory
    assert memory is not None and parse_size(memory) == size


@pytest.mark.parametrize("text", ["512", "0M", "0.0M", "M", "-1G", "1,5G", "512Q", "512 MBB", "1e9", "lots", ""])
def test_what_is_not_a_size_is_refused_everywhere(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size of memory that works; write for example 512M or 1\.5G"):
        parse_size(text)
    with pytest.raises(ConfigError, match=r"expected a size, such as 512M or 1\.5G"):
        parse_settings(f'memory: "{text}"')


@pytest.mark.parametrize("text", ["1K", "1023 KiB", "9999999999G"])
def test_a_size_that_no_model_fits_is_refused_everywhere(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size of memory that works"):
        parse_size(text)
    with pytest.raises(ConfigError, match="line 1: memory: "):
        parse_settings(f"memory: {text}")
