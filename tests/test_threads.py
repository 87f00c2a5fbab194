"""The cpu backend's results do not depend on which threads make them, nor on who else has some."""

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmaml import functional
from fastmaml.backends import cpu

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason="no C++ extension")


MODEL = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))
TASKS = [(torch.randn(100, n, 3), torch.randn(100, n, 2)) for n in (5, 7)]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """With one, nothing here could go wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def meta_gradient() -> list[Tensor]:
    loss, grads = functional.meta_value_and_grad(
        MODEL, dict(MODEL.named_parameters()), *TASKS, loss="mse", lr=0.1, steps=3, backend="cpu"
    )
    return [loss, *grads.values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_bitwise_reproducible_whatever_the_threads() -> None:
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            found.append(meta_gradient())
    finally:
        torch.set_num_threads(threads)
    assert all(same(found[0], other) for other in found[1:])


def test_several_callers_at_once() -> None:
    wanted = meta_gradient()
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: [meta_gradient() for _ in range(5)], range(4)))
    assert all(same(wanted, grads) for of_caller in found for grads in of_caller)


def _send_meta_gradient(to: Any) -> None:
    to.send([g.tolist() for g in meta_gradient()])


def test_a_forked_child_does_not_wait_for_threads_it_has_not() -> None:
    wanted = meta_gradient()  # OpenMP has threads now, of which a fork copies none
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_send_meta_gradient, args=(there,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        child.start()
    try:
        assert here.poll(60), "the child hangs"
        assert here.recv() == [g.tolist() for g in wanted]
    finally:
        child.kill()
        child.join()
