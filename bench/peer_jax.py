"""JAX jit(grad(vmap(task))): the same networks, weights and data as the torch peers, on the same device."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.peers import Absent

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is the other peers' too
jax.config.update("jax_default_matmul_precision", "highest")  # as torch's: the default may be TF32 on a GPU


def _device_of(a: Tensor) -> Any:
    if not a.is_cuda:
        return jax.devices("cpu")[0]
    try:
        return jax.devices("gpu")[a.get_device()]
    except RuntimeError as error:
        raise Absent(f"this jax has no GPU, as jax[cuda12] and jax[cuda13] have ({error})") from error


def _forward(layers: Sequence[nn.Module], params: Sequence[Any], x: Any) -> Any:
    """x [N, I] through the layers; params in the order of named_parameters()."""
    rest = iter(params)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            weight, bias = next(rest), next(rest)
            x = x @ weight.T + bias
        elif isinstance(layer, nn.BatchNorm1d):
            gamma, beta = next(rest), next(rest)
            mean, var = x.mean(0), x.var(0)
            x = (x - mean) * jax.lax.rsqrt(var + layer.eps) * gamma + beta
        elif isinstance(layer, nn.ReLU):
            x = jax.nn.relu(x)
        else:
            raise TypeError(f"no JAX twin of {type(layer).__name__}")
    return x


def _criterion(loss: str, output: Any, y: Any) -> Any:
    if loss == "mse":
        return jnp.mean((output - y) ** 2)
    return -jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], axis=1).mean()


def build(case: Case, dtype: torch.dtype) -> Any:
    """step() of bench.peers."""

    def precision() -> AbstractContextManager:
        return jax.enable_x64(True) if dtype == torch.float64 else nullcontext()

    model = case.model(dtype)
    layers = list(model)

    def loss(params: list, x: Any, y: Any) -> Any:
        return _criterion(case.loss, _forward(layers, params, x), y)

    def task(params: list, x_s: Any, y_s: Any, x_q: Any, y_q: Any) -> Any:
        for _ in range(case.steps):
            grads = jax.grad(loss)(params, x_s, y_s)
            params = [p - case.lr * g for p, g in zip(params, grads, strict=True)]
        return loss(params, x_q, y_q)

    def mean_loss(params: list, *data: Any) -> Any:
        return jax.vmap(task, (None, 0, 0, 0, 0))(params, *data).mean()

    with precision():
        support, query = case.data(dtype)
        device = _device_of(support[0])
        params = [jax.device_put(p.detach().cpu().numpy(), device) for p in model.parameters()]
        data = [jax.device_put(t.cpu().numpy(), device) for t in (*support, *query)]
        gradient = jax.jit(jax.grad(mean_loss))

    def step() -> list[Any]:
        with precision():
            return jax.block_until_ready(gradient(params, *data))

    return step
