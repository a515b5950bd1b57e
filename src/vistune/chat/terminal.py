"""The terminal side of a conversation: reads lines, obeys /commands, prints answers as they come.

With a pipe instead of a terminal there are no prompts and no colours: one line in, one answer out.
Control characters of an answer are written out in both: what is piped is often looked at later.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vistune.chat.session import ChatSession
from vistune.data.visible import visible
from vistune.errors import VistuneError

if TYPE_CHECKING:
    from vistune.assembly import Origin

COMMANDS = (
    ("/image PATH", "talk about an image in the next question"),
    ("/reset", "forget the conversation and its images"),
    ("/help", "this list"),
    ("/exit", "leave (so does end of file)"),
)
_DIM, _RED, _PLAIN = "\033[2m", "\033[31m", "\033[0m"


@dataclass(frozen=True)
class ChatOptions:
    """What `vistune chat` was asked for.

    Args:
        images: Images of the first question.
        prompt: One question to answer and leave; None for a conversation.
        system: System prompt.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy.
        top_p: Nucleus of sampling.
        device: Device name.
        dtype: Number format name.
        origin: What the directory does not say itself; None for nothing.
    """

    images: tuple[Path, ...] = ()
    prompt: str | None = None
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    device: str = "auto"
    dtype: str = "auto"
    origin: Origin | None = None


def run_chat(model: Path, options: ChatOptions) -> int:
    """Loads a model and holds a conversation on standard input and output.

    Args:
        model: Run, checkpoint or exported directory.
        options: Everything else.

    Returns:
        The exit code.

    Raises:
        VistuneError: The model cannot be loaded, or a one-shot question cannot be answered.
    """
    from vistune.chat.speaker import load_speaker

    if sys.stderr.isatty():
        print(f"loading {model} ...", file=sys.stderr, flush=True)
    speaker = load_speaker(
        model,
        device=options.device,
        dtype=options.dtype,
        temperature=options.temperature,
        top_p=options.top_p,
        origin=options.origin,
    )
    for note in speaker.assembled.notes:
        print(f"note: {note}", file=sys.stderr)
    session = ChatSession(speaker, options.max_new_tokens, options.system)
    for image in options.images:
        session.add_image(image)
    if options.prompt is not None:
        for piece in session.ask(options.prompt):
            print(visible(piece), end="", flush=True)
        print()
        return 0
    terminal = ChatTerminal(session, sys.stdin, sys.stdout, sys.stderr)
    terminal.greet(speaker.description)
    return terminal.run()


class ChatTerminal:
    """Reads questions and commands, prints answers; an error never ends the conversation.

    Args:
        session: The conversation.
        source: Where lines come from.
        out: Where answers go.
        err: Where messages go.
    """

    def __init__(self, session: ChatSession, source: TextIO, out: TextIO, err: TextIO) -> None:
        self.session = session
        self.source = source
        self.out = out
        self.err = err
        self.is_terminal = source.isatty() and out.isatty()
        self.has_colours = err.isatty() and not os.environ.get("NO_COLOR")
        self.num_errors = 0

    def greet(self, description: str) -> None:
        """Says who answers and what can be typed."""
        if self.is_terminal:
            self._say(f"{description}\n/image PATH, /reset, /help, /exit", _DIM)

    def run(self) -> int:
        """Holds the conversation until the input ends.

        Returns:
            0; with a pipe, 1 when any line could not be answered.
        """
        for line in self._lines():
            text = line.strip()
            if not text:
                continue
            if text in ("/exit", "/quit"):
                break
            try:
                self._handle(text)
            except VistuneError as error:
                self.num_errors += 1
                self._say(f"error: {error}", _RED)
            except KeyboardInterrupt:
                # Ends the answer, not the conversation.
                self.out.write("\n")
                self._say("(stopped; this question and its answer are forgotten)", _DIM)
        return 0 if self.is_terminal or self.num_errors == 0 else 1

    def _lines(self) -> Iterator[str]:
        if not self.is_terminal:
            yield from self.source
            return
        _enable_line_editing()
        while True:
            waiting = len(self.session.pending)
            mark = f"[{waiting} image{'s' if waiting > 1 else ''}] > " if waiting else "> "
            try:
                yield input(mark)
            except EOFError:
                self.out.write("\n")
                return
            except KeyboardInterrupt:
                self.out.write("\n")
                return

    def _handle(self, text: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/reset": self._reset,
            "/help": self._help,
        }
        word, _, rest = text.partition(" ")
        if word in commands:
            commands[word](rest.strip())
        elif word.startswith("/") and word[1:].isalpha():
            self.num_errors += 1
            self._say(f"error: unknown command {word}; /help lists the commands", _RED)
        else:
            for piece in self.session.ask(text):
                self.out.write(visible(piece))
                self.out.flush()
            self.out.write("\n")
            self.out.flush()

    def _image(self, rest: str) -> None:
        if not rest:
            self.num_errors += 1
            self._say("error: /image needs the path of an image", _RED)
            return
        path = rest[1:-1] if rest[0] == rest[-1] and rest[0] in "'\"" and len(rest) > 1 else rest
        image = self.session.add_image(path)
        if self.is_terminal:
            self._say(f"(image {image.name}: ask about it)", _DIM)

    def _reset(self, _: str) -> None:
        self.session.reset()
        if self.is_terminal:
            self._say("(forgotten)", _DIM)

    def _help(self, _: str) -> None:
        width = max(len(name) for name, _ in COMMANDS)
        self._say("\n".join(f"{name:<{width}}  {what}" for name, what in COMMANDS), _DIM)

    def _say(self, text: str, style: str) -> None:
        shown = f"{style}{text}{_PLAIN}" if self.has_colours else text
        self.err.write(shown + "\n")
        self.err.flush()


def _enable_line_editing() -> None:
    """Gives `input` history and cursor keys where the platform has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
