"""Random programs through the `cuda` backend, against `fastmaml.reference`: see test_random_programs.py."""

import pytest
import torch
from cases import Case, cases, error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_random_programs import CHECK, FUNCTIONS, _everything, conditioning, meta_loss

from fastmaml import functional, reference
from fastmaml.backends import cuda

pytestmark = pytest.mark.skipif(cuda.available() is not None, reason=cuda.available() or "")


def test_float64() -> None:
    # by the seed that a test's name gives, these are other draws than those of the other backends
    @settings(CHECK, max_examples=25)
    @given(
        case=cases(max_width=24), function=st.sampled_from(FUNCTIONS + 3 * [meta_loss]), knobs=st.booleans()
    )
    def check_cuda(case: Case, function, knobs: bool) -> None:
        case.optimizer = None  # it runs on the torch backend
        how: dict = {"chunk_tasks": 2, "checkpoint_every": 2} if knobs else {}
        if function not in (meta_loss, FUNCTIONS[1]):
            how.pop("checkpoint_every", None)
        truth = _everything(function, reference, case, how)
        there = case.to(device="cpu" if cuda.EMULATED else "cuda")
        try:
            actual = _everything(function, functional, there, {**how, "backend": "cuda"})
        except RuntimeError as why:
            if cuda.EMULATED or "shared memory" not in str(why):
                raise
            return  # not on this GPU
        errors = {n: error(actual[n].cpu(), truth[n]) for n in truth}
        if not all(e <= 1e-10 for e in errors.values()):  # only as far as the draw is ill-conditioned
            bound = 100 * torch.finfo(torch.float64).eps * conditioning(function, case, how)
            assert all(e < bound for e in errors.values()), errors

    check_cuda()
