# SPDX-License-Identifier: Apache-2.0
"""How a command ends at a signal: it removes what it has half written."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def unwinding_when_terminated() -> Iterator[None]:
    """SIGTERM and a terminal that goes away end a command as Ctrl-C does: by an exception, here `SystemExit`."""
    numbers = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: object) -> None:
        del frame
        raise SystemExit(128 + number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def when_told_to_end(act: Callable[[], None]) -> None:
    """Have SIGTERM, SIGINT and a terminal that goes away call `act`, in place of what they did before."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: act())


def end_with_parent(parent: int) -> None:
    """Have Linux send SIGTERM to this process when its parent ends.

    Args:
        parent: the parent's id; if that is no longer the parent, it has ended already.

    Raises:
        SystemExit: it has.
    """
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGTERM)
