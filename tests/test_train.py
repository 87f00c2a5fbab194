"""A run that is stopped and resumed is the uninterrupted run, bit for bit."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmaml.experiment import Estimate
from fastmaml.train import Interrupted, StopSignals, Training, save_atomically


class Waves:
    """Meta-batches of 4 tasks, each a function of its index."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x = torch.rand(2, 4, 5, 1, generator=torch.Generator().manual_seed(index))
        return x[0], x[0].sin(), x[1], x[1].sin()


class Learner(nn.Module):
    """Looks like fastmaml.MAML to the training loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
        return (self.model(x_q) - y_q).square().mean()


def training(**options) -> Training:
    options = {"iterations": 40, "decay": "cosine", "settings": {"seed": 0}} | options
    return Training(Learner(), Waves(), **options)


def state(run: Training, tmp_path: Path) -> dict:
    run.save(tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True) | {"seconds": None}


def assert_same(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("stop", [1, 7, 10, 23, 40])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_resumed(tmp_path, stop, signum):
    options = {"log_every": 10, "evaluate_every": 20, "evaluate": lambda: {"test_loss": 1.5}}
    whole = training()
    whole.fit(**options)

    first = training()
    with pytest.raises(Interrupted, match=rf"{signal.Signals(signum).name} at step {stop}; .*--resume"):
        first.fit(
            checkpoint=tmp_path / "c.pt",
            tick=lambda step: os.kill(os.getpid(), signum) if step == stop else None,
            **options,
        )
    second = training()
    second.load(tmp_path / "c.pt")
    assert second.step == stop
    second.fit(**options)
    assert_same(state(second, tmp_path), state(whole, tmp_path))
    assert [line["step"] for line in second.history] == [10, 20, 30, 40]


def test_resumed_from_a_periodic_checkpoint(tmp_path):
    whole = training()
    whole.fit(log_every=10)

    def die(step: int) -> None:
        if step == 33:
            raise ConnectionError

    first = training()
    with pytest.raises(ConnectionError):  # as a power cut: nothing is written on the way out
        first.fit(checkpoint=tmp_path / "c.pt", checkpoint_every=15, log_every=10, tick=die)
    second = training()
    second.load(tmp_path / "c.pt")
    assert second.step == 30
    second.fit(log_every=10)
    assert_same(state(second, tmp_path), state(whole, tmp_path))


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_atomically({"step": 1}, path)

    def full(*args, **kwargs):
        args[1].write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_resume_refuses_other_settings(tmp_path):
    training().save(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        training(settings={"seed": 1}).load(tmp_path / "c.pt")


def test_the_second_signal_acts_as_usual():
    # a job in the background of a shell starts with this signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loss_that_diverges_is_said():
    run = training()
    with torch.no_grad():
        run.flat.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="meta-loss is nan at step 5: lower"):
        run.fit(log_every=5)


def test_cosine_decay_ends_at_zero():
    run = training()
    rates = []
    for run.step in (0, 20, 40):
        rates.append(run.learning_rate())
    assert rates == pytest.approx([1e-3, 5e-4, 0.0])


def test_the_interval_covers_the_mean_95_times_in_100():
    torch.manual_seed(0)
    estimates = [Estimate.of(torch.randn(600) + 2) for _ in range(1000)]
    covered = sum(abs(e.mean - 2) <= e.half for e in estimates)
    assert 930 <= covered <= 970
