"""Work on a folder that may hang, in a process of its own that can be left behind.

What waits in the kernel for a server that is gone cannot be ended, nor can a thread. Python 3.9 and the standard
library alone.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from ansible_collections.gpuyard.fleet.plugins.module_utils.model_verify import ModelError

Tell = Callable[..., None]
"""Takes what is told as keywords; told nothing, it is a sign of life."""


def watched(work: Callable[[Tell], None], silence: float, patience: float, deadline: float) -> Iterator[dict[str, Any]]:
    """What a process of its own tells that does the work. Raises TimeoutError where it falls silent.

    While it says that it is filling, the store is waited for as well, for `patience` more. What hangs in the kernel
    cannot be ended: it is left behind, holds nothing of ours open, and dies before it does anything more.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(read_end)
        _work(work, write_end)
    os.close(write_end)
    rest, more = b"", 0.0
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(0)
            bound = min(silence + more, left)
            if not select.select([read_end], [], [], bound)[0]:
                raise TimeoutError(bound if bound < left else 0)
            got = os.read(read_end, 65536)
            if not got:
                return
            *lines, rest = (rest + got).split(b"\n")
            for line in lines:
                word = json.loads(line)
                more = (patience if word["filling"] else 0.0) if "filling" in word else more
                yield word
    finally:
        os.close(read_end)
        os.kill(child, signal.SIGKILL)
        until = time.monotonic() + 2
        while not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() < until:
            time.sleep(0.01)


def _work(work: Callable[[Tell], None], write_end: int) -> None:
    """The process's whole life."""

    def tell(**word: object) -> None:
        os.write(write_end, json.dumps(word).encode() + b"\n")

    try:
        # Whoever waits for the end of the module's output must not wait for a process that hangs.
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nothing, descriptor)
        work(tell)
    except ModelError as refused:
        tell(said=str(refused))
    except OSError as wrong:
        if wrong.errno != errno.EPIPE:
            tell(said=_said(wrong))
    except Exception as wrong:
        tell(said=f"MODEL-SHARED-ERROR: {type(wrong).__name__}: {wrong}; the shared folder is passed over")
    finally:
        os._exit(0)


def _said(wrong: OSError) -> str:
    where = wrong.filename or "the shared folder"
    if wrong.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"MODEL-SHARED-FULL: {where}: {wrong.strerror}; it is passed over. Free some space there"
    if wrong.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"MODEL-SHARED-READ-ONLY: {where}: {wrong.strerror}; it is passed over. Let one node write there"
    return f"MODEL-SHARED-ERROR: {where}: {wrong.strerror}; it is passed over. Look at its server"
