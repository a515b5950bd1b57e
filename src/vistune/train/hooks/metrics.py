"""`metrics.jsonl`: one JSON object per logged step, on disk as soon as the step is done."""

from __future__ import annotations

import json
from pathlib import Path

from vistune.train.hooks.base import Hook
from vistune.train.record import StepRecord


class MetricsHook(Hook):
    """Appends records to a JSON-lines file.

    Args:
        path: The file; resuming has already cut it after the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def on_record(self, record: StepRecord) -> None:
        """Writes one line. It is handed to the system at once, so that a killed process keeps it.

        `allow_nan` is off: a number that is none has no place in the file.
        """
        self._file.write(json.dumps(record.to_json(), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
