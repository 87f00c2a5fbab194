"""A model changed between two calls is traced again: what ran before must not run on."""

import pytest
import torch
from modules import L
from torch import nn
from torch.nn.utils import parametrize

from fastmaml import functional
from fastmaml.backends import problem_for
from fastmaml.program import Unsupported, trace

X = torch.randn(2, 3, 4)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def forward_hook(model):
    return model[0].register_forward_hook(lambda module, args, out: 3 * out)


def pre_hook(model):
    return model[0].register_forward_pre_hook(lambda module, args: (3 * args[0],))


def output(model):
    return functional.apply(model, dict(model.named_parameters()), X)


@pytest.mark.filterwarnings("ignore:fastmaml falls back")
@pytest.mark.parametrize("add", [forward_hook, pre_hook])
def test_a_hook_added_after_the_first_call_is_called_and_once_removed_is_not(add):
    model = nn.Sequential(L(), nn.Tanh())
    plain = output(model)
    torch.testing.assert_close(plain, model(X))
    hook = add(model)
    assert not torch.allclose(model(X), plain)
    torch.testing.assert_close(output(model), model(X))
    hook.remove()
    assert torch.equal(output(model), plain)


@pytest.mark.filterwarnings("ignore:fastmaml falls back")
def test_a_parametrization_added_after_the_first_call_is_used_and_once_removed_is_not():
    model = nn.Sequential(L(), nn.Tanh())
    plain = output(model)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    assert not torch.allclose(model(X), plain)
    torch.testing.assert_close(output(model), model(X))
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    torch.testing.assert_close(output(model), plain)


@pytest.mark.parametrize("add", [forward_hook, pre_hook])
def test_the_layer_ops_refuse_hooks_naming_the_module(add):
    model = nn.Sequential(L(), nn.Tanh())
    add(model)
    with pytest.raises(Unsupported, match="forward hooks") as caught:
        trace(model, (4,))
    assert caught.value.module == "0"


def test_an_unchanged_model_is_traced_once():
    model = nn.Sequential(L(), nn.Tanh())
    assert problem_for(model, (4,), None) is problem_for(model, (4,), None)


class Counting(nn.Sequential):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_a_count_of_its_own_calls_leaves_the_problem_as_it_was():
    model = Counting(L(), nn.Tanh())
    assert problem_for(model, (4,), None) is problem_for(model, (4,), None)


def test_a_hyperparameter_is_read_again():
    model = nn.Sequential(L(), nn.LeakyReLU(0.1))
    for slope in (0.1, 0.9):
        setattr(model[1], "negative_slope", slope)  # noqa: B010, pyright takes it for a module
        torch.testing.assert_close(output(model), model(X))
    model[1] = nn.Identity()
    model[1] = nn.LeakyReLU(0.3)  # where the former one was in memory
    torch.testing.assert_close(output(model), model(X))


class ByNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = L()

    def forward(self, x):
        y = self.layer(x)
        return torch.tanh(y) if len(x) == 3 else y


@pytest.mark.filterwarnings("ignore:fastmaml falls back")
def test_a_model_that_asks_for_the_number_of_examples_has_no_program_once_it_matters():
    model = ByNumber()
    for n in (2, 3, 2):
        x = torch.randn(2, n, 4)
        found = functional.apply(model, dict(model.named_parameters()), x)
        torch.testing.assert_close(found, torch.stack([model(task) for task in x]))
    why = problem_for(model, (4,), None).why_no_program
    assert "3 examples" in str(why)
