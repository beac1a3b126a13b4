"""Clients of a daemon that runs. A module that uses them has the fixture `daemon`."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2 as httpx
import openai
import pytest

from tests.daemon.running import Running


@pytest.fixture
def http(daemon: Running) -> Iterator[httpx.Client]:
    with daemon.http() as client:
        yield client


@pytest.fixture
def client(daemon: Running) -> Iterator[openai.OpenAI]:
    with daemon.http() as transport, openai.OpenAI(
        base_url="http://flashd/v1", api_key="none", http_client=transport, max_retries=0
    ) as client:  # fmt: skip
        yield client
