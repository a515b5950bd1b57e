"""Held-out questions, from a file of questions or from LLaVA-format rows. Nothing is skipped.

A test set that cannot be read whole is not read at all: every broken row is named by file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vistune.data.formats import open_source
from vistune.data.formats.base import IMAGE_MARK, split_images
from vistune.data.image import ImagePlan, probe
from vistune.errors import DataError, RowError, VistuneError
from vistune.recipe import ImageConfig, SourceConfig
from vistune.types import ImageDefaults, ImageRef, Turn

_MAX_LISTED = 10
_FORM = '{"id", "image", "question", "answers": [...], "type"?, "choices"?: [...]}'


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out question.

    Args:
        id: Unique id.
        where: File and line or row, for messages.
        turns: What is put to the model: earlier turns if any, then the question.
        images: The images the turns refer to.
        answers: Answers that count as right; one per annotator where there are several.
        type: Group in the tables; "all" when the file names none.
        language: Second grouping, where the file has one.
        choices: The options of a multiple-choice question; empty for a free answer.
    """

    id: str
    where: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]
    answers: tuple[str, ...]
    type: str = "all"
    language: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The question alone, without image marks."""
        return self.turns[-1].text.strip()

    @property
    def unit(self) -> str:
        """What is drawn again in a bootstrap: the images, or the question where it has none."""
        return "|".join(image.name for image in self.images) or f"question {self.id}"

    def blind(self) -> Question:
        """Returns the same question without its images.

        Only the images and the line breaks that set them off from the text are left out.
        """
        return replace(self, turns=tuple(_without_images(t) for t in self.turns), images=())


def _without_images(turn: Turn) -> Turn:
    texts = [part for part in turn.parts if isinstance(part, str)]
    if len(texts) == len(turn.parts):
        return turn
    return Turn(turn.speaker, ("\n".join(filter(None, (text.strip("\n") for text in texts))),))


def read_questions(
    path: str | Path, *, images: str | Path | None = None, limit: int | None = None
) -> list[Question]:
    """Reads a test set.

    Args:
        path: JSONL or a JSON list, of questions or of LLaVA rows (whose last answer is the gold).
        images: Folder the image paths are relative to; the file's own folder when left out.
        limit: Only the first questions.

    Raises:
        DataError: The file cannot be read, or any row of it is wrong; all rows at fault are named.
    """
    file = Path(path)
    folder = Path(images) if images is not None else file.parent
    problems: list[str] = []
    rows = list(_rows(file, problems))
    if any("conversations" in row for _, row in rows):
        questions = _llava_questions(file, folder, problems)
    else:
        questions = []
        for where, row in rows:
            try:
                questions.append(_question(row, where, folder))
            except DataError as error:
                problems.append(str(error))
    problems += _unreadable_images(questions)
    problems += _repeated_ids(questions)
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:_MAX_LISTED])
        more = len(problems) - _MAX_LISTED
        raise DataError(
            f"{len(problems)} rows of the test set cannot be used{shown}"
            + (f"\n  ... and {more} more" if more > 0 else ""),
            where=str(file),
            expected=f"{_FORM}, or rows in LLaVA's format",
            fix="mend these rows, or take them out of the file; `vistune data convert FILE OUT --to"
            " llava` makes LLaVA rows of other formats",
        )
    if not questions:
        raise DataError("the test set has no question", where=str(file), expected=_FORM)
    return questions[:limit]


def _rows(file: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a JSON list or JSONL file with their place."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"cannot read the test set: {error.strerror}",
            where=str(file),
            expected=f"a .jsonl or .json file of questions: {_FORM}",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError("the test set is not UTF-8 text", where=str(file), got=error) from error
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            where = f"{file}:{error.lineno}:{error.colno}"
            raise DataError(f"not valid JSON: {error.msg}", where=where) from error
        numbered = [(f"{file} row {n}", entry) for n, entry in enumerate(entries)]
    else:
        numbered = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    numbered.append((where, json.loads(line)))
                except json.JSONDecodeError as error:
                    problems.append(f"{where}: not valid JSON: {error.msg}")
    for where, entry in numbered:
        if isinstance(entry, dict):
            yield where, entry
        else:
            problems.append(f"{where}: a row is an object, not {type(entry).__name__}")


def _question(row: dict[str, Any], where: str, folder: Path) -> Question:
    question_id = row.get("id", row.get("question_id"))
    if not isinstance(question_id, (str, int)) or isinstance(question_id, bool):
        raise DataError("'id' is missing or neither text nor a number", where=where)
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError("'question' is missing or empty", where=where)
    answers = _texts(row, "answers", where) or _texts(row, "answer", where)
    if not answers:
        raise DataError("'answers' is missing or empty", where=where)
    choices = _texts(row, "choices", where)
    if choices and not set(answers) & set(choices):
        raise DataError(
            "no answer is among the choices", where=where, got=answers, expected=choices
        )
    names = _texts(row, "image", where)
    marks = text.count(IMAGE_MARK)
    if marks not in (0, len(names)):
        raise DataError(
            f"the question has {marks} {IMAGE_MARK} marks for {len(names)} images", where=where
        )
    marked = text if marks else "".join(f"{IMAGE_MARK}\n" for _ in names) + text
    kind, language = row.get("type"), row.get("language")
    return Question(
        id=str(question_id),
        where=where,
        turns=(Turn("user", split_images(marked, first=0)[0]),),
        images=tuple(_image(name, folder, where) for name in names),
        answers=answers,
        type="all" if kind is None else str(kind),
        language=None if language is None else str(language),
        choices=choices,
    )


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Returns a key's text or list of texts; numbers count as text, absent as empty."""
    value = row.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(v, bool) or not isinstance(v, (str, int, float)) for v in values):
        raise DataError(f"'{key}' is not text or a list of texts", where=where, got=value)
    return tuple(str(v) for v in values)


def _image(name: str, folder: Path, where: str) -> ImageRef:
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise DataError(
            f"the image '{name}' lies outside the image folder",
            where=where,
            expected=f"a path inside {folder}",
            fix="name the right folder with --images",
        )
    if not path.is_file():
        raise DataError(
            f"the image '{name}' does not exist",
            where=where,
            got=str(path),
            fix="name the folder the paths start from with --images",
        )
    return ImageRef(path, name)


def _llava_questions(file: Path, folder: Path, problems: list[str]) -> list[Question]:
    """Reads LLaVA rows as questions: all but the last answer are context, the last is the gold."""
    reader = open_source(SourceConfig(path=str(file), images=str(folder)))
    questions = []
    for row in range(len(reader)):
        try:
            sample = reader.read(row)
        except VistuneError as error:
            problems.append(str(error))
            continue
        *turns, answer = sample.turns
        if answer.speaker != "assistant" or not answer.text.strip():
            problems.append(f"{sample.where}: the last turn is not an answer")
            continue
        question = Question(
            sample.id, sample.where, tuple(turns), sample.images, (answer.text.strip(),)
        )
        questions.append(question)
    return questions


def _unreadable_images(questions: list[Question]) -> list[str]:
    """Reads the header of every image once, so that a broken one is named before any answer."""
    # Only the limit on pixels matters here; what the tower wants is not known.
    plan = ImagePlan.resolve(ImageConfig(), ImageDefaults(224, (0.5,) * 3, (0.5,) * 3))
    seen: set[Path] = set()
    problems = []
    for question in questions:
        for image in question.images:
            if image.path in seen:
                continue
            seen.add(image.path)
            try:
                probe(image, plan)
            except RowError as error:
                problems.append(str(error.at(question.where)))
    return problems


def _repeated_ids(questions: list[Question]) -> list[str]:
    seen: dict[str, str] = {}
    repeated = []
    for question in questions:
        first = seen.setdefault(question.id, question.where)
        if first != question.where:
            repeated.append(f"{question.where}: the id '{question.id}' is already at {first}")
    return repeated
