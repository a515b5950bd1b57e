"""Worker processes that end when the process that started them is gone.

A pool's workers wait for work on a pipe of which they hold both ends, so that one whose parent was
killed would wait for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Makes this worker process end as soon as its parent has ended, in whatever way."""
    threading.Thread(target=_wait, name="end-with-parent", daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
