"""A sweep over a Program, op by op for all tasks at once: which passes run on which buffers.

It drives any namespace of passes with the names and signatures of `fastmaml.kernels`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..losses import CrossEntropy
from .request import Examples

if TYPE_CHECKING:
    from . import Problem
    from .rows import Rows

_NORMS = ("batch_norm", "layer_norm")  # over the rows of a task, and over the columns
_PRODUCERS = ("linear", *_NORMS)
_ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu")


@dataclass(frozen=True)
class Node:
    """An op and the activation behind it that it computes too.

    inputs, out: buffers;  z: what the activation takes, None without one
    w, b: places of the parameters, None where absent
    moves, moves_in: do the output, the inputs depend on a parameter?
    first_in, first_w, first_b: is this the first op on the way back to write that gradient?
    joins: a norm of the output of the linear layer before it, whose forward pass computes it too
    """

    name: str
    inputs: tuple[int, ...]
    out: int
    z: int | None
    w: int | None
    b: int | None
    act: Any
    attr: float = 0.0
    moves: bool = False
    moves_in: tuple[bool, ...] = ()
    first_in: tuple[bool, ...] = ()
    first_w: bool = False
    first_b: bool = False
    joins: bool = False


@dataclass(frozen=True)
class Plan:
    """The nodes of a Program in order, and what its buffers hold of an example: rows and columns."""

    nodes: tuple[Node, ...]
    sizes: tuple[tuple[int, int], ...]
    moves: tuple[bool, ...]  # each buffer
    output: int
    used: frozenset[int]  # parameters


def make_plan(problem: "Problem", types: ModuleType, factored: tuple[int, ...] = ()) -> Plan:
    """types: fastmaml.kernels.types, or its like; factored: weights whose layers fuse nothing"""
    program = problem.program
    assert program is not None
    place = {name: i for i, name in enumerate(problem.names)}
    readers: dict[int, list[int]] = {program.output: [-1]}
    for i, op in enumerate(program.ops):
        for b in op.inputs:
            readers.setdefault(b, []).append(i)
    moves = [False] * len(program.buffers)
    for op in program.ops:
        moves[op.output] = any(moves[b] for b in op.inputs) or any(p is not None for p in op.params)
    nodes, folded = [], set()
    for i, op in enumerate(program.ops):
        if i in folded:
            continue
        w, b = (None if p is None else place[p] for p in (*op.params, None, None)[:2])
        attrs = dict(op.attrs)
        node = Node(op.name, op.inputs, op.output, None, w, b, types.NO_ACTIVATION, attrs.get("eps", 0.0))
        follower = readers[op.output][0]
        if op.name in _ACTIVATIONS:
            node = replace(node, act=_activation(op, types))
        elif op.name in _PRODUCERS and w not in factored and len(readers[op.output]) == 1 and follower >= 0:
            after = program.ops[follower]
            if after.name in _ACTIVATIONS and moves[op.output]:
                folded.add(follower)
                node = replace(node, act=_activation(after, types), z=op.output, out=after.output)
        if node.name in _NORMS and nodes:
            before = nodes[-1]
            takes = before.name == "linear" and before.z is None and before.w not in factored
            node = replace(node, joins=takes and before.out == node.inputs[0])
        nodes.append(node)

    for i, node in enumerate(nodes):
        moves_in = tuple([moves[b] for b in node.inputs])
        nodes[i] = replace(node, moves=moves[node.out], moves_in=moves_in)
    seen: set[Any] = set()

    def first(kind: str, place: int | None) -> bool:
        new = place is not None and (kind, place) not in seen
        seen.add((kind, place))
        return new

    for i, node in reversed(list(enumerate(nodes))):
        nodes[i] = replace(
            node,
            first_in=tuple([first("buffer", b) for b in node.inputs]),
            first_w=first("parameter", node.w),
            first_b=first("parameter", node.b),
        )
    sizes = tuple((prod(s[:-1]), s[-1]) if s else (1, 1) for s in program.buffers)
    used = frozenset(p for node in nodes for p in (node.w, node.b) if p is not None)
    return Plan(tuple(nodes), sizes, tuple(moves), program.output, used)


def _activation(op: Any, types: ModuleType) -> Any:
    attrs = dict(op.attrs)
    name = "leaky_relu" if op.name == "relu" else op.name
    return types.Activation(name, float(attrs.get("negative_slope", attrs.get("tanh", 0.0))))


@dataclass(frozen=True)
class Frame:
    """The buffers of one set of examples, and what norms keep beside them."""

    buffers: list[Any]  # types.Buffer
    statistics: dict[int, Tensor]  # by node
    examples: Examples
    on_query: bool

    def of(self, dual: bool) -> list[Any]:
        """The buffers, without tangents for a plain pass."""
        return self.buffers if dual else [type(b)(b.value, b.grad) for b in self.buffers]


class Frames:
    """Allocates frames of a set of n examples; the tangents are shared by all of them."""

    def __init__(self, plan: Plan, types: ModuleType, examples: Examples, dual: bool, x_grad: bool) -> None:
        self.plan, self.types, self.examples, self.x_grad = plan, types, examples, x_grad
        T, n = examples.x.shape[:2]
        self.shapes = [(T, n * R, C) for R, C in plan.sizes]
        self.tangents = [self._new(b, dual and plan.moves[b]) for b in range(len(plan.sizes))]
        self.t_grads = [self._new(b, dual and self._has_grad(b)) for b in range(len(plan.sizes))]
        for node in plan.nodes:
            if node.z is not None and dual and node.act.curved:
                self.tangents[node.z] = self._new(node.z, True)

    def _new(self, b: int, wanted: bool) -> Any:
        return self.examples.x.new_empty(self.shapes[b]) if wanted else None

    def _has_grad(self, b: int) -> bool:
        return self.plan.moves[b] or self.x_grad or b == self.plan.output

    def make(self, on_query: bool = False) -> Frame:
        hidden = {node.z for node in self.plan.nodes if not node.act.reads_input}  # z that nothing reads
        x = self.examples.x
        buffers = []
        for b, shape in enumerate(self.shapes):
            value = x.view(shape) if b == 0 else self._new(b, b not in hidden)
            inner = any(node.z == b for node in self.plan.nodes)
            grad = self._new(b, self._has_grad(b) and not inner)
            buffers.append(self.types.Buffer(value, grad, self.tangents[b], self.t_grads[b]))
        statistics = {}
        for i, node in enumerate(self.plan.nodes):
            if node.name.endswith("_norm"):
                T, M, C = self.shapes[node.inputs[0]]
                statistics[i] = x.new_empty(T, C if node.name == "batch_norm" else M, 4)
        return Frame(buffers, statistics, self.examples, on_query)


class Sweep:
    """Runs the passes. params: place -> types.Param; updates: place -> types.Update, absent: not wanted.

    rows: by node, the layers whose weights stay factors; rates: by node, the step size that scales v there
    """

    def __init__(self, plan: Plan, passes: ModuleType | SimpleNamespace, loss: Any, precision: str) -> None:
        self.plan, self.passes, self.loss_of = plan, passes, loss
        self.precision = {"precision": precision}
        self.rows: dict[int, Rows] = {}
        self.rates: dict[int, Tensor] = {}

    def forward(self, frame: Frame, params: Mapping[int, Any], *, dual: bool = False) -> None:
        nodes, buffers = self.plan.nodes, frame.of(dual)
        for i, node in enumerate(nodes):
            if node.joins or (dual and not node.moves):
                continue
            x, y, z = self._layer(buffers, node)
            w, b = self._get(params, node.w), self._get(params, node.b)
            if i in self.rows:
                how = {"on_query": frame.on_query, "dual": dual}
                self.rows[i].forward(x, b, y, self.rates.get(i), **how)
            elif node.name == "linear":
                joined = i + 1 < len(nodes) and nodes[i + 1].joins
                norm = self._norm(frame, buffers, params, i + 1) if joined else None
                self.passes.linear_forward(x, w, b, y, z, node.act, norm, dual=dual, **self.precision)
            elif node.name in _NORMS:
                run = getattr(self.passes, f"{node.name}_forward")
                run(x, w, b, y, z, frame.statistics[i], node.act, eps=node.attr, dual=dual)
            elif node.name in ("add", "flatten"):
                other = buffers[node.inputs[1]] if node.name == "add" else None
                self.passes.add_forward(x, other, y, dual=dual)
            else:
                self.passes.elementwise_forward(x, y, node.act, dual=dual)

    def loss(self, frame: Frame, value: Tensor | None, *, dual: bool = False) -> None:
        """The loss [T] and the gradient of the output, or its tangent."""
        z, (_, target, weight) = frame.of(dual)[self.plan.output], frame.examples
        if isinstance(self.loss_of, CrossEntropy):
            smoothing = self.loss_of.label_smoothing
            self.passes.cross_entropy(z, target, weight, value, smoothing=smoothing, dual=dual)
        else:
            self.passes.mse(z, target, weight, value, dual=dual)

    def backward(
        self,
        frame: Frame,
        params: Mapping[int, Any],
        updates: "Updates",
        *,
        dual: bool = False,
        x_grad: bool = False,
        only_params: bool = False,
    ) -> None:
        """only_params: the gradients of the buffers are there from an earlier sweep"""
        buffers = frame.of(dual)
        for i, node in reversed(list(enumerate(self.plan.nodes))):
            if not node.moves and (only_params or not x_grad):
                continue
            wants = [not only_params and (moves or x_grad) for moves in node.moves_in]
            add = [not first for first in node.first_in]
            x, y, z = self._layer(buffers, node)
            w = self._get(params, node.w)
            to_w, to_b = updates.of(node.w, node.first_w), updates.of(node.b, node.first_b)
            if node.name == "linear":
                how = {"dual": dual, **self.precision}
                if i in self.rows:
                    to_w = None
                    if wants[0]:
                        self.rows[i].backward(x, y, self.rates.get(i), add=add[0], dual=dual)
                elif wants[0]:
                    self.passes.linear_backward_input(x, w, y, z, node.act, add=add[0], **how)
                if to_w or to_b:
                    self.passes.linear_backward_weight(x, y, z, to_w, to_b, node.act, **how)
            elif node.name in _NORMS:
                if wants[0] or to_w or to_b:
                    run = getattr(self.passes, f"{node.name}_backward")
                    how = {"wants_x": wants[0], "add": add[0], "dual": dual}
                    run(x, w, y, z, frame.statistics[i], to_w, to_b, node.act, **how)
            elif node.name in ("add", "flatten"):
                for b, wanted, more in zip(node.inputs, wants, add, strict=True):
                    if wanted:
                        self.passes.add_backward(buffers[b], y, add=more, dual=dual)
            elif wants[0]:
                self.passes.elementwise_backward(x, y, node.act, add=add[0], dual=dual)

    def _norm(self, frame: Frame, buffers: list[Any], params: Mapping[int, Any], i: int) -> Any:
        node = self.plan.nodes[i]
        _, y, z = self._layer(buffers, node)
        w, b, axis = self._get(params, node.w), self._get(params, node.b), _NORMS.index(node.name)
        return self.passes.types.Norm(w, b, y, z, frame.statistics[i], node.act, node.attr, axis)

    @staticmethod
    def _layer(buffers: list[Any], node: Node) -> tuple[Any, Any, Any]:
        """x, y, z"""
        return buffers[node.inputs[0]], buffers[node.out], None if node.z is None else buffers[node.z]

    @staticmethod
    def _get(params: Mapping[int, Any], place: int | None) -> Any:
        return None if place is None else params[place]


class Updates:
    """Where the gradients of a sweep back go; of a tied parameter the second op adds to the first's."""

    def __init__(self, updates: Mapping[int, Any]) -> None:
        self.updates = updates

    def of(self, place: int | None, first: bool) -> Any:
        update = None if place is None else self.updates.get(place)
        return update if update is None or first else update._replace(base=update.dst)
