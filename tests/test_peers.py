"""bench/peers.py: what cannot run is absent, what breaks is not."""

import importlib

import pytest
import torch

from fastmaml import functional
from fastmaml.backends import cuda

peers, cases = (importlib.import_module(f"bench.{name}") for name in ("peers", "cases"))
CASE = cases.select(["sine/small"])[0]


def test_a_backend_that_cannot_run_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "supports", lambda *_: "no CUDA device (for this test)")
    with pytest.raises(peers.Absent, match="no CUDA device") as absent:
        peers.fastmaml_on("cuda")(CASE, torch.float32)
    assert "no CUDA device" in peers.absence("fastmaml cuda", absent.value)


def test_a_kernel_that_fails_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_, **__):
        raise RuntimeError("backend 'torch': an illegal memory access was encountered")

    monkeypatch.setattr(functional, "meta_value_and_grad", fails)
    with pytest.raises(RuntimeError, match="illegal") as error:
        peers.fastmaml_on("torch")(CASE, torch.float32)()
    with pytest.raises(RuntimeError, match="illegal"):
        peers.absence("fastmaml torch", error.value)
    assert peers.absence("loop", error.value).startswith("RuntimeError: ")
