"""The embedded Prefect server: what its pages are told."""

from __future__ import annotations

import pytest
from prefect.settings import Settings

from flows.embedded import pages_of


def test_the_pages_of_a_server_on_any_port_ask_that_server(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:40123/api"
    assert Settings().server.ui.api_url != url
    for name, value in pages_of(url).items():
        monkeypatch.setenv(name, value)
    assert Settings().server.ui.api_url == url
