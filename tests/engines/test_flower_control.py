"""What Flower's programs inherit from whoever starts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.flower_control import flower_environment


def test_internal_switches_of_flower_are_not_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    environment = flower_environment(tmp_path)
    assert "FLWR_INTERNAL_GRPC_CONTROL_API" not in environment
    assert environment["FLWR_LOG_LEVEL"] == "DEBUG"


def test_flower_installs_nothing_and_reaches_its_own_server_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NO_PROXY", "hospital.example.org")
    monkeypatch.setenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "0")
    environment = flower_environment(tmp_path)
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["NO_PROXY"].split(",") == ["127.0.0.1", "localhost", "hospital.example.org"]
