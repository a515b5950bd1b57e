"""TensorBoard event files, written through the tensorboard package alone.

torch's own writer would import a second of CPU time's worth of modules for the same bytes.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from vistune.train.hooks.base import Hook
from vistune.train.record import StepRecord

_SCALARS = (
    "loss",
    "grad_norm",
    "epoch",
    "target_tokens",
    "tokens",
    "image_tokens",
    "samples",
    "tokens_per_s",
    "samples_per_s",
    "tflop",
    "useful_tflops",
    "mfu",
    "padding_frac",
    "step_s",
    "data_wait_frac",
    "peak_memory_gib",
    "skipped_steps",
    "rejected_rows",
)


class TensorBoardHook(Hook):
    """Writes scalars of each record, and texts.

    Args:
        folder: Directory of the event files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._first_step = 0

    def _open(self) -> None:
        """Opens the file at the first write, so that the import does not delay the first step."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((self._folder / name).open("wb"))
        self._write(file_version="brain.Event:2")
        if self._first_step > 0:
            # A restart: TensorBoard drops what an earlier process wrote from here on.
            start = SessionLog(status=SessionLog.START)
            self._write(step=self._first_step + 1, session_log=start)

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._writer is None:
            self._open()
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def on_start(self, step: int) -> None:
        """Remembers where this process starts."""
        self._first_step = step

    def on_record(self, record: StepRecord) -> None:
        """Writes one scalar per number; those not measured are left out."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        entries = record.to_json()
        numbers = {name: entries[name] for name in _SCALARS if entries[name] is not None}
        numbers |= {f"loss/{name}": value for name, value in record.loss_per_source.items()}
        numbers |= {f"tokens/{name}": value for name, value in record.tokens_per_source.items()}
        numbers |= {f"lr/{role}": value for role, value in record.lr.items()}
        values = [Summary.Value(tag=f"train/{k}", simple_value=v) for k, v in numbers.items()]
        self._write(step=record.step, summary=Summary(value=values))
        self._writer.flush()

    def text(self, tag: str, text: str, *, step: int) -> None:
        """Writes a text (Markdown) under a tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode("utf-8")])
        value = Summary.Value(tag=tag, metadata=plugin, tensor=tensor)
        self._write(step=step, summary=Summary(value=[value]))
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
