"""The engine of an MLP small enough for one program a task: kernels/mlp.py in the place of the sweeps."""

from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from ..losses import CrossEntropy
from .engine import Engine
from .request import Request
from .sweep import Plan, make_plan


def fits(passes: ModuleType | SimpleNamespace, request: Request, precision: str) -> bool:
    """Is it a plain call for the meta-loss or its gradient by the parameters, in float32, of an MLP with two
    hidden layers within passes.MLP_MOST?"""
    if not hasattr(passes, "mlp") or request.tail != "loss" or not request.want <= {"loss", "params"}:
        return False
    if request.rule or request.step_weights or request.factored or request.steps == 0 or precision != "ieee":
        return False
    assert request.support is not None
    assert request.query is not None
    assert request.lr is not None
    plan, adapt, most = make_plan(request.problem, passes.types), request.problem.adapt, passes.MLP_MOST
    if not _is_mlp(plan) or not all(adapt) or len(plan.used) < len(adapt):
        return False
    hidden = [plan.sizes[node.out][1] for node in plan.nodes[:2]]
    return (
        (request.like.dtype is torch.float32 or not request.like.is_cuda)
        and request.lr.shape[1] in (1, 6)
        and max(request.support.x.shape[1], request.query.x.shape[1]) <= most["examples"]
        and max(plan.sizes[0][1], plan.sizes[plan.output][1]) <= most["ends"]
        and max(hidden) <= most["hidden"]
    )


def _is_mlp(plan: Plan) -> bool:
    nodes = plan.nodes
    if len(nodes) != 3 or any(node.name != "linear" or node.b is None for node in nodes):
        return False
    chained = all(after.inputs == (before.out,) for before, after in pairwise(nodes))
    acts = [node.act for node in nodes]
    rows = all(R == 1 for R, _ in plan.sizes)
    places = len({p for node in nodes for p in (node.w, node.b)}) == 6
    return chained and rows and places and acts[0] == acts[1] and acts[0].name != "none" == acts[2].name


class SmallMlp(Engine):
    """As Engine; its state beside the data is W_k of the steps and v."""

    def _allocate(self, second_order: bool) -> None:
        kind, new, T, P = self.kind, self.kind.like.new_zeros, self.T, self.P
        self.w0 = new(T if any(self.own) else 1, P)
        self.scale = self.kind.like.new_full((1,), kind.scale)
        self.order = [p for node in self.plan.nodes for p in (node.w, node.b) if p is not None]
        self.lr_in_order = self.lr
        if self.lr.shape[1] > 1:
            self.columns = torch.tensor(self.order, device=self.lr.device)
            self.lr_in_order = torch.zeros_like(self.lr)
        self.kept = new(self.K if second_order else 1, T, P)
        self.v = new(T, P) if self.adjoint else None
        self.loss = new(T)
        self.out = self.grad_lr = self.x_s = self.x_q = None
        self.grads: Tensor | None = new(self.rows, P) if self.adjoint else None

    def run(self) -> None:
        kind, nodes = self.kind, self.plan.nodes
        assert kind.support is not None
        assert kind.query is not None
        places = tuple(self.places[p][2] for p in self.order)
        widths = self.plan.sizes[0][1], *(self.plan.sizes[node.out][1] for node in nodes)
        if self.lr_in_order is not self.lr:
            torch.index_select(self.lr, 1, self.columns, out=self.lr_in_order)
        self.sweep.passes.mlp(
            kind.support, kind.query, self.w0, self.lr_in_order, self.scale, self.kept, self.v, self.loss,
            widths, places, nodes[0].act,
            classes=isinstance(kind.problem.loss, CrossEntropy),
            smoothing=getattr(kind.problem.loss, "label_smoothing", 0.0),
            steps=self.K, first_order=kind.first_order,
        )  # fmt: skip
        self.loss.mul_(self.scale)
        if self.grads is not None:
            self._write_grads(self.grads)
