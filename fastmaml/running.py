"""What a model does while it runs: which module is at it, read off the interpreter's frames, and whether it
turns gradients off. Nothing is patched for it."""

from collections.abc import Callable, Iterator, Mapping
from sys import _getframe
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_CALL = nn.Module._call_impl.__code__


def innermost(
    names: Mapping[int, str], error: BaseException | None = None, until: CodeType | None = None
) -> tuple[str, nn.Module] | None:
    """Path and module of the innermost of `names` (id -> path) running now, or when `error` was raised.

    until: look no further out than the function of this code
    """
    for frame in _now(until) if error is None else _then(error):
        if frame.f_code is _CALL:
            module = frame.f_locals["self"]
            if id(module) in names:
                return names[id(module)], module
    return None


def _now(until: CodeType | None) -> Iterator[FrameType]:
    frame: FrameType | None = _getframe(2)
    while frame is not None and frame.f_code is not until:
        yield frame
        frame = frame.f_back


def _then(error: BaseException) -> Iterator[FrameType]:
    frames, step = [], error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    return reversed(frames)


class _GradMode(TorchFunctionMode):
    off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.off |= func is torch._C._set_grad_enabled and not args[0]
        return func(*args, **(kwargs or {}))


def turns_grad_off(call: Callable[[], Any]) -> bool:
    """Is there a torch.no_grad() within it?"""
    with torch.enable_grad(), _GradMode() as mode:
        call()
        return mode.off
