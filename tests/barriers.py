"""A pytest plugin for ttsem, which runs the threads of a program as one.

A load of what the program has stored since its last barrier is an error: another thread may have stored it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from ttsem.interp import Interp
from ttsem.ops import OPS

stored: list[np.ndarray] = []  # addresses, since the last barrier


def before(name: str, note: Callable[[np.ndarray], None], mask_at: int) -> None:
    """Of each such op, `note` gets the addresses that its mask leaves."""
    handler = OPS[name]

    def run(interp: Interp, op: Any, args: list[Any]) -> list[Any]:
        addresses = np.asarray(args[0], dtype=np.int64) if args else np.zeros(0)
        if len(args) > mask_at:
            addresses = addresses[np.broadcast_to(np.asarray(args[mask_at], bool), addresses.shape)]
        note(addresses.ravel())
        return handler(interp, op, args)

    OPS[name] = run


def check(addresses: np.ndarray) -> None:
    if any(np.isin(addresses, some).any() for some in stored):
        raise AssertionError("no barrier between a store and a load of it")


def forget(_: np.ndarray) -> None:
    stored.clear()


before("tt.load", check, 1)
before("tt.store", stored.append, 2)
before("ttg.barrier", forget, 1)
run_program = Interp.run


def run(self: Interp, *args: Any) -> list[Any]:
    stored.clear()
    return run_program(self, *args)


Interp.run = run  # type: ignore[assignment]
