"""What only a GPU shows of the `triton` and `cuda` backends: streams, graphs, devices, no waiting."""

import pytest
import torch
from cases import Case
from test_random_programs import _everything, meta_loss
from test_triton import case_of, mlp
from torch import Tensor, nn

import fastmaml
from fastmaml import functional
from fastmaml.losses import MSE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.fixture
def case() -> Case:
    return case_of(mlp(3, 40, 40, 2, act=nn.Tanh), MSE(), 5, 6, 7, 3).to(device="cuda")


def results(case: Case, backend: str) -> dict[str, Tensor]:
    return _everything(meta_loss, functional, case, {"backend": backend})


def test_the_recorded_graph_is_what_it_recorded(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recorded, replayed = (results(case, "triton") for _ in range(3))
    assert all(torch.equal(plain[n], recorded[n]) and torch.equal(plain[n], replayed[n]) for n in plain)
    monkeypatch.setenv("FASTMAML_CUDA_GRAPHS", "0")
    assert all(torch.equal(plain[n], a) for n, a in results(case, "triton").items())


@each_backend
def test_nothing_waits_for_the_device(case: Case, backend: str) -> None:
    for _ in range(2):  # compiled and recorded, or planned
        meta_loss(functional, case, backend=backend).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meta_loss(functional, case, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
def test_it_runs_on_the_current_stream(case: Case, backend: str) -> None:
    """After what that stream is still at: on another one it would read the examples too early."""
    truth, examples = results(case, backend), case.support[0].detach().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            with torch.no_grad():
                case.support[0].zero_()
                torch.cuda._sleep(10**7)
                case.support[0].copy_(examples)
            actual = results(case, backend)
    stream.synchronize()
    assert all(torch.equal(truth[n], actual[n]) for n in truth)


@each_backend
def test_a_graph_of_the_callers_has_it(case: Case, backend: str) -> None:
    """Replayed, it reads what its tensors hold by then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(case, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = results(case, backend)
    with torch.no_grad():
        case.support[0].mul_(2)
    graph.replay()
    truth = results(case, backend)
    assert all(torch.equal(truth[n], recorded[n]) for n in truth)


@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_the_device_of_its_tensors(case: Case, backend: str) -> None:
    truth, actual = results(case, backend), results(case.to(device="cuda:1"), backend)
    assert all(torch.equal(truth[n].cpu(), actual[n].cpu()) for n in truth)


def test_cuda_tensors_go_to_kernels_by_themselves(case: Case) -> None:
    explained = fastmaml.explain(case.model, case.support[0], MSE())
    assert "backend: triton" in explained or "backend: cuda" in explained
