"""Settings that every test shares."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # before matplotlib is first imported

import pytest
import torch

if not torch.cuda.is_available():  # read when the kernels are first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FASTMAML_EMULATE", "1")

from hypothesis import HealthCheck, settings

# A first example may build or trace something; times are claims of bench/, not of tests.
settings.register_profile("fastmaml", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fastmaml")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds torch, and lets no FASTMAML_BACKEND of the caller's choose what is tested."""
    monkeypatch.delenv("FASTMAML_BACKEND", raising=False)
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="every planted fault and architecture, not a fifth of them"
    )


@pytest.fixture
def every(request: pytest.FixtureRequest) -> int:
    """Of a long table of faults: 1 for all, 5 for each fifth, as `make test` has time for."""
    return 1 if request.config.getoption("--all") else 5
