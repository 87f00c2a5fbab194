"""The commands as a user types them, each in its own process unless only the arguments matter."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmaml.cli import main

SMALL = ["--iterations", "60", "--tasks", "3", "--shots", "4", "--eval-tasks", "120", "--eval-steps", "2"]
SMALL += ["--log-every", "10", "--evaluate-every", "20", "--checkpoint-every", "7", "--quiet"]


def fastmaml(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastmaml", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def outcome(out: Path) -> tuple[dict, dict]:
    """The checkpoint and the results of a run, less times, the command and the commit."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    results = json.loads((out / "results.json").read_text())
    for name in ("command", "training_seconds", "commit"):
        del results[name]
    return checkpoint | {"seconds": None}, results


@pytest.fixture(scope="module")
def sine_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    fastmaml("train", "sine", *SMALL, "--out", str(out))
    return out


def test_train_sine_fills_its_folder(sine_run):
    checkpoint, results = outcome(sine_run)
    assert checkpoint["step"] == 60
    assert results["settings"]["seed"] == 0
    assert results["torch"] == torch.__version__
    assert len(results["test"]["loss"]) == 3
    assert all(row["half"] > 0 for row in results["test"]["loss"])
    assert [line["step"] for line in results["history"]] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in results["history"] if "test_loss" in line] == [20, 40, 60]
    assert (sine_run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((sine_run / "tensorboard").glob("events.*"))


def test_train_with_an_inner_optimizer(sine_run, tmp_path):
    more = ["--inner-steps", "2", "--inner-momentum", "0.9", "--inner-weight-decay", "0.01"]
    more += ["--inner-clip", "5", "--every-step"]
    fastmaml("train", "sine", *SMALL, *more, "--out", str(tmp_path))
    _, results = outcome(tmp_path)
    assert results["settings"]["inner_momentum"] == 0.9
    assert results["test"]["loss"] != outcome(sine_run)[1]["test"]["loss"]


def test_losses_on_every_step_need_a_step(tmp_path, capsys):
    more = ["--inner-steps", "0", "--every-step", "--out", str(tmp_path)]
    assert main(["train", "sine", *SMALL, *more]) == 2
    assert "--every-step needs --inner-steps of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_results(sine_run, tmp_path, signum):
    arguments = ["train", "sine", *SMALL, "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "step 9\n"
    process.send_signal(signum)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "--resume continues" in message
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] < 60
    fastmaml(*arguments, "--resume")

    (a, results_a), (b, results_b) = outcome(sine_run), outcome(tmp_path)
    assert results_a == results_b
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name])
    for i, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][i][name])


# The command, but slow enough to be hit in the middle by a signal.
SLOW = """
import sys, time
from fastmaml import cli, train
advance = train.Training.advance
def slowly(self):
    advance(self)
    if self.step == 9:
        print("step 9", file=sys.stderr, flush=True)
    time.sleep(0.05 if self.step >= 9 else 0)
train.Training.advance = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


def test_train_omniglot_on_made_up_characters(tmp_path, monkeypatch, capsys):
    import numpy as np

    from fastmaml import commands, tasks

    class Made(tasks.Omniglot):
        def __init__(self, root: Path, split: str) -> None:
            generator = torch.Generator().manual_seed(0)
            prototypes = torch.rand(30, 1, 1, 28, 28, generator=generator)
            noise = 0.3 * torch.rand(30, 4, 20, 28, 28, generator=generator)
            self.images = (200 * (prototypes + noise).clamp(max=1)).to(torch.uint8)
            self.classes = np.arange(20) if split == "train" else np.arange(20, 30)
            self.rotations = 4

    monkeypatch.setattr(commands, "Omniglot", Made)
    arguments = [
        "--data",
        str(tmp_path),
        "--shots",
        "1",
        *SMALL[:4],
        *SMALL[8:],
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", "omniglot", *arguments, "--eval-tasks", "100"]) == 0
    _, results = outcome(tmp_path / "run")
    assert len(results["test"]["accuracy"]) == 3
    assert results["test"]["accuracy"][-1]["mean"] > 0.9
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train sine --iterations 0", "must be at least 1, got 0"),
        ("train sine --inner-lr nan", "must be a positive number, got nan"),
        ("train sine --shots few", "invalid positive_int value: 'few'"),
        ("train omniglot", "--data"),
        ("train cats", "invalid choice: 'cats'"),
        ("explain sine --shape 1,x", "--shape"),
        ("train sine --resume --overwrite", "not allowed with argument"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train sine --out {} --resume", "nothing to resume"),
        ("train sine --out {} --backend abacus", "abacus"),
        ("train omniglot --data {}", "images_background.zip"),
        ("explain resnet", "module:factory"),
        ("explain no_such_module:make", "no_such_module"),
        ("explain json:loads", "cannot be made"),
        ("explain collections:OrderedDict", "must give an nn.Module, got OrderedDict"),
        ("explain torch.nn:Identity", "--shape is needed"),
    ],
)
def test_what_cannot_run_is_said_before_any_work(arguments, message, capsys, tmp_path):
    assert main(arguments.format(tmp_path).split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (Path("file", "x"), "Not a directory"),
        (Path("file"), "File exists"),
        (Path("/proc/x"), "No such file or directory"),
        (Path("/proc"), ""),  # it exists, and takes no files
        (Path("x" * 300), "File name too long"),
    ],
)
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_that_cannot_be_is_said_before_any_work(out, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastmaml.train.Training.fit", lambda *_, **__: pytest.fail("it began to train"))
    (tmp_path / "file").write_text("")
    assert main(["train", "sine", *SMALL, "--out", str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastmaml: error: ")
    assert message in said


def test_a_factory_with_a_syntax_error(tmp_path, capsys, monkeypatch):
    (tmp_path / "half_a_net.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["explain", "half_a_net:make", "--shape", "1"]) == 2
    said = capsys.readouterr().err
    assert "cannot import 'half_a_net:make'" in said
    assert "half_a_net.py, line 1" in said


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastmaml", "explain", "sine"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert process.stderr == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_run_is_not_overwritten_unasked(sine_run, capsys):
    assert main(["train", "sine", "--out", str(sine_run)]) == 2
    assert "--resume continues it, --overwrite starts again" in capsys.readouterr().err
    assert main(["train", "sine", *SMALL, "--seed", "1", "--out", str(sine_run), "--resume"]) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err


def test_explain_names_the_layers_and_the_backend(capsys):
    assert main(["explain", "omniglot"]) == 0
    said = capsys.readouterr().out
    assert "batch_norm" in said
    assert "torch" in said


def test_demo_prints_the_table_and_saves_the_picture(tmp_path, capsys):
    began = time.perf_counter()
    assert main(["demo", "--iterations", "20", "--out", str(tmp_path), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "MAML, K=5" in said
    assert "pretrained, K=10" in said
    assert "0.67" in said
    assert (tmp_path / "sine.png").read_bytes().startswith(b"\x89PNG")
    assert time.perf_counter() - began < 60
