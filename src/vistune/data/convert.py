"""From one dataset format to another, and exactly what that would lose.

Every row is written, read back by the new format's own reader, and compared with what it was. What
differs is a loss, counted by kind; so no list of what a format can hold exists that could be wrong.
One pass, one row in memory at a time; the output appears whole at the end, or not at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from vistune.data.formats import (
    alpaca,
    cogvlm_sft,
    data_juicer,
    llava,
    messages,
    open_source,
    sharegpt,
    visualglm,
    webdataset,
    xtuner,
)
from vistune.data.formats.base import IMAGE_MARK, conversation, row_id
from vistune.data.formats.captions import CAPTION_QUESTION, captioned
from vistune.data.formats.json_rows import RowContent
from vistune.data.formats.rendering import (
    NotHeldError,
    behind_images,
    one_caption,
    rounds,
    system_of,
)
from vistune.data.sinks import (
    CocoSink,
    CsvSink,
    FolderSink,
    Images,
    JsonSink,
    ParquetSink,
    Sink,
    TarSink,
    appearing,
    folder_key,
)
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.registry import Registry
from vistune.types import Sample, Turn

ReadBack: TypeAlias = tuple[object, tuple[Turn, ...], int]
"""Id, turns and number of images of a row that was read back."""


@dataclass(frozen=True)
class Target:
    """A format that can be written.

    Args:
        render: A sample and what stands for its images, as a row; leaves out what it cannot say.
        read: What the format's reader makes of that row.
        kind: `rows` (a JSON, JSONL or Parquet file), `coco`, `csv`, `tar`, or a folder: `labels`
            (CogVLM-SFT) or `captions`.
    """

    render: Callable[[Sample, Sequence[Any]], dict[str, Any]]
    read: Callable[[dict[str, Any]], ReadBack]
    kind: str = "rows"

    @property
    def is_folder(self) -> bool:
        """Whether a folder is written."""
        return self.kind in ("labels", "captions")


@dataclass
class Conversion:
    """What a conversion did, or would do.

    Args:
        num_rows: Rows read.
        num_written: Rows written.
        losses: How many rows lose something, by kind; "row: ..." are rows that are lost whole.
        examples: The first row of every kind, and what became of it.
        images: Folder that the new file's image names are relative to; None where it holds them.
    """

    num_rows: int = 0
    num_written: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    images: Path | None = None

    def lose(self, kind: str, example: str) -> None:
        """Counts a loss."""
        self.losses[kind] += 1
        self.examples.setdefault(kind, example)

    def table(self) -> str:
        """Returns the losses as lines of text, each with its first row."""
        return "\n".join(
            f"{number:>8}  {kind}: {self.examples[kind]}"
            for kind, number in self.losses.most_common()
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the result in JSON's types."""
        return {
            "num_rows": self.num_rows,
            "num_written": self.num_written,
            "losses": dict(self.losses.most_common()),
            "examples": self.examples,
            "images": None if self.images is None else str(self.images),
        }


def convert(
    source: SourceConfig,
    output: Path,
    *,
    to: str,
    images_to: Path | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes a source in another format.

    Args:
        source: The source.
        output: The file or folder to write. For formats of one object a row its ending says how:
            `.json`, `.jsonl` or `.parquet` (which holds the images as well).
        to: Name of the new format.
        images_to: A new folder that images are copied into; left out, the new file names them where
            they are. Only for files that name images.
        allow_loss: Write what can be written; otherwise any loss is an error.
        overwrite: Replace an older file.
        dry_run: Count the losses and write nothing; images are then not read.
        progress: Told (rows done, rows in all).

    Returns:
        What was written and lost.

    Raises:
        DataError: Something would be lost (and `allow_loss` is not set), the output is there
            already, or an image stands inside the source and no folder was named for it.
        RegistryError: There is no such format to write.
        MissingExtraError: Parquet needs pyarrow.
    """
    target = TARGETS.get(to)
    _check_places(target, output, images_to, may_exist=dry_run, overwrite=overwrite)
    reader = open_source(source)
    result = Conversion()
    with ExitStack() as stack:
        place = _Place(target, to, output, images_to, _image_root(source))
        sink: Sink = _Nowhere(is_folder=target.is_folder)
        if not dry_run:
            sink = stack.enter_context(place.open(result))
        for row in range(len(reader)):
            result.num_rows += 1
            try:
                _convert_row(reader.read(row), row, target, sink, result, write=not dry_run)
            except NotHeldError as error:
                result.lose(f"row: {error.kind}", reader.where(row))
            except RowError as error:
                found = error if error.where else error.at(reader.where(row))
                result.lose(f"row: unusable, {error.reason}", f"{found.where}: {found.what}")
            if progress is not None and (row % 256 == 255 or row + 1 == len(reader)):
                progress(row + 1, len(reader))
        if result.losses and not allow_loss and not dry_run:
            raise DataError(
                f"{to} cannot hold all of it; nothing was written. Rows that would lose"
                f" something, of {result.num_rows}:\n{result.table()}",
                where=source.path,
                fix="--allow-loss writes the rest; or choose another format",
            )
    return result


def _convert_row(
    sample: Sample, row: int, target: Target, sink: Sink, result: Conversion, *, write: bool
) -> None:
    key = sink.key(sample.id, row=row)
    names = sink.names(sample.images, key=key)
    content = target.render(sample, names)
    kept = dict(content) if "id" in content else {**content, "id": key}
    found = differences(sample, target.read(kept))
    if write:
        sink.add(content, sample.images, key=key)
    result.num_written += 1
    for kind, example in found:
        result.lose(kind, f"{sample.where} (id {sample.id}): {example}")


def differences(sample: Sample, after: ReadBack) -> Iterator[tuple[str, str]]:
    """Yields what a row lost on the way, by kind, each with an example.

    Args:
        sample: The row as it was.
        after: What the new format's reader makes of it.
    """
    id, turns, num_images = after
    if row_id(id, stem="", row=0) != sample.id:
        yield "id", f"becomes {id!r}"
    if num_images != len(sample.images):
        yield "images", f"{len(sample.images)} become {num_images}"
    was, now = (_by_speaker(found) for found in (sample.turns, turns))
    if was["system"] != now["system"]:
        yield "system_prompt", repr(sample.turns[0].text[:60])
    for kind, speaker in (("question", "user"), ("answer", "assistant")):
        before, behind = was[speaker], now[speaker]
        if len(before) != len(behind):
            yield "rounds", f"{len(before)} become {len(behind)}"
            return
        for old, new in zip(before, behind, strict=True):
            if old == new:
                continue
            if "".join(old.text.split()) != "".join(new.text.split()):
                yield kind, f"{old.text[:60]!r} becomes {new.text[:60]!r}"
            elif _image_places(old) != _image_places(new):
                yield "image_position", repr(old.text[:60])
            else:
                yield "blanks", f"{old.text[:60]!r} becomes {new.text[:60]!r}"
            break  # one round stands for all of the row's


def _image_places(turn: Turn) -> list[int]:
    """Returns how many characters, blanks aside, stand before each image."""
    places, before = [], 0
    for part in turn.parts:
        if isinstance(part, str):
            before += len("".join(part.split()))
        else:
            places.append(before)
    return places


def _by_speaker(turns: Sequence[Turn]) -> dict[str, list[Turn]]:
    return {who: [t for t in turns if t.speaker == who] for who in ("system", "user", "assistant")}


# --- where to ---------------------------------------------------------------------------------


def _check_places(
    target: Target, output: Path, images_to: Path | None, *, may_exist: bool, overwrite: bool
) -> None:
    for place, may in ((output, overwrite and not output.is_dir()), (images_to, False)):
        if place is not None and place.exists() and not (may or may_exist):
            raise DataError(
                "the output is there already",
                where=str(place),
                fix="name another, or --overwrite a file; folders are never overwritten",
            )
    endings = {"rows": (".json", ".jsonl", ".parquet"), "tar": (".tar",)}.get(target.kind)
    if endings and output.suffix not in endings:
        raise DataError(
            "the output's ending does not say how it is written",
            where=str(output),
            expected=f"a name that ends in {' or '.join(endings)}",
        )
    if images_to is not None and not (
        target.kind in ("coco", "csv") or (target.kind == "rows" and output.suffix != ".parquet")
    ):
        raise DataError(
            "this output holds the images itself",
            where="--images-to",
            fix="leave --images-to out",
        )


def _image_root(source: SourceConfig) -> Path:
    if source.images:
        return Path(source.images)
    path = Path(source.path)
    if source.format == "cogvlm_sft":
        return path.parent / "images"
    return path if path.is_dir() else path.parent


@dataclass(frozen=True)
class _Place:
    target: Target
    format: str
    output: Path
    images_to: Path | None
    root: Path

    @contextmanager
    def open(self, result: Conversion) -> Iterator[Sink]:
        """Opens the sink; it is finished when nothing was raised."""
        kind = self.target.kind
        with ExitStack() as stack:
            part = stack.enter_context(appearing(self.output, is_folder=self.target.is_folder))
            if self.target.is_folder:
                text = ("labels", ".json") if kind == "labels" else (".", ".txt")
                images = "images" if kind == "labels" else "."
                yield FolderSink(part, text=text, images=images)
                return
            copies = None
            if self.images_to is not None:
                copies = stack.enter_context(appearing(self.images_to, is_folder=True))
            with part.open("wb") as file:
                sink = self._file_sink(file, Images(copies, root=self.root))
                yield sink
                sink.finish()
            if not isinstance(sink, TarSink | ParquetSink):
                result.images = self.images_to or self.root

    def _file_sink(self, file: Any, images: Images) -> Sink:
        match self.target.kind:
            case "tar":
                return TarSink(file)
            case "coco":
                return CocoSink(file, images)
            case "csv":
                return CsvSink(file, images)
        if self.output.suffix == ".parquet":
            return ParquetSink(file, format=self.format)
        return JsonSink(file, images, is_list=self.output.suffix == ".json")


class _Nowhere:
    """Counts what a real sink would lose, and keeps nothing."""

    def __init__(self, *, is_folder: bool) -> None:
        self._taken: set[str] | None = set() if is_folder else None

    def key(self, id: str, *, row: int) -> str:
        return id if self._taken is None else folder_key(id, row=row, taken=self._taken)

    def names(self, images: Sequence[Any], *, key: str) -> list[Any]:
        return [f"{k}.jpg" for k in range(len(images))]

    def add(self, content: dict[str, Any], images: Sequence[Any], *, key: str) -> None:
        return

    def finish(self) -> None:
        return


# --- the formats ------------------------------------------------------------------------------


def _rows(
    interpret: Callable[[dict[str, Any]], RowContent],
) -> Callable[[dict[str, Any]], ReadBack]:
    def read(row: dict[str, Any]) -> ReadBack:
        meant = interpret(json.loads(json.dumps(row)))
        turns, _ = conversation(meant.turns, num_images=len(meant.images))
        return meant.id, turns, len(meant.images)

    return read


def _read_caption(row: dict[str, Any]) -> ReadBack:
    turns, _ = captioned(row["caption"], question=row.get("question") or CAPTION_QUESTION)
    return row["id"], turns, 1


def _render_coco(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    _, caption = one_caption(sample)
    is_number = sample.id.isascii() and sample.id.isdigit() and str(int(sample.id)) == sample.id
    return {"id": int(sample.id) if is_number else None, "caption": caption}


def _render_csv(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    question, caption = one_caption(sample)
    asked = "" if question == CAPTION_QUESTION else question
    return {"id": sample.id, "image": images[0], "question": asked, "caption": caption}


def _render_caption(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    return {"caption": one_caption(sample)[1]}


def _read_text_file(row: dict[str, Any]) -> ReadBack:
    turns, _ = captioned(row["caption"].strip())
    return row["id"], turns, 1


def _render_label(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    if len(images) != 1:
        raise NotHeldError("several_images" if images else "no_image")
    said = []
    system = system_of(sample)
    if system:
        said.append({"role": "system", "content": system})
    for k, (question, answer) in enumerate(rounds(sample)):
        # The image stands in front of the first question, and nowhere else.
        text = behind_images(question, number=1 if k == 0 else 0).replace(IMAGE_MARK, "")
        said += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"conversations": said}


def _read_label(row: dict[str, Any]) -> ReadBack:
    turns, _ = conversation(cogvlm_sft.turns_of(row), num_images=1)
    return row["id"], turns, 1


def _read_member(row: dict[str, Any]) -> ReadBack:
    return _rows(lambda content: webdataset.conversation_of(json.dumps(content)))(row)


TARGETS: Registry[Target] = Registry("data format to write")
"""Formats that can be written, by the names that are read."""

TARGETS.register("llava")(Target(llava.render, _rows(llava.interpret)))
TARGETS.register("sharegpt")(Target(sharegpt.render, _rows(sharegpt.interpret)))
TARGETS.register("messages")(Target(messages.render, _rows(messages.interpret)))
TARGETS.register("xtuner")(Target(xtuner.render, _rows(xtuner.interpret)))
TARGETS.register("alpaca")(Target(alpaca.render, _rows(alpaca.interpret)))
TARGETS.register("visualglm")(Target(visualglm.render, _rows(visualglm.interpret)))
TARGETS.register("data_juicer")(Target(data_juicer.render, _rows(data_juicer.interpret)))
TARGETS.register("webdataset")(Target(messages.render, _read_member, "tar"))
TARGETS.register("coco_captions")(Target(_render_coco, _read_caption, "coco"))
TARGETS.register("captions_csv")(Target(_render_csv, _read_caption, "csv"))
TARGETS.register("image_folder")(Target(_render_caption, _read_text_file, "captions"))
TARGETS.register("cogvlm_sft")(Target(_render_label, _read_label, "labels"))
