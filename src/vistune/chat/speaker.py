"""A loaded model as a partner in conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vistune.assembly import Assembled, Origin, load_assembled
from vistune.data.image import load as load_image
from vistune.device import Device, select_device
from vistune.generate import Prompt, stream
from vistune.types import ImageRef, Turn


class ModelSpeaker:
    """Answers with a loaded model.

    Args:
        assembled: The model.
        device: Where it is.
        temperature: 0 for greedy.
        top_p: Nucleus of sampling.
    """

    def __init__(
        self, assembled: Assembled, device: Device, *, temperature: float = 0.0, top_p: float = 1.0
    ) -> None:
        self.assembled = assembled
        self.device = device
        self.temperature = temperature
        self.top_p = top_p

    @property
    def description(self) -> str:
        """One line on what answers, for the greeting."""
        num = sum(p.numel() for p in self.assembled.model.parameters())
        dtype = str(self.device.dtype).removeprefix("torch.")
        return (
            f"{self.assembled.origin} ({num / 1e6:.1f} M parameters, {self.device.kind}, {dtype})"
        )

    @property
    def context_tokens(self) -> int | None:
        """Positions the language model was built for; None when its config does not say."""
        positions = self.assembled.model.config.get_text_config().to_dict()
        limit = positions.get("max_position_embeddings")
        return int(limit) if limit else None

    def check_image(self, image: ImageRef) -> None:
        """Decodes an image once, so that a broken one is refused before it is talked about.

        Raises:
            ImageError: It cannot be used.
        """
        load_image(image, self.assembled.encoder.image_plan)

    def num_prompt_tokens(self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...]) -> int:
        """Returns the length of the prompt, image tokens included."""
        return len(self.assembled.encoder.encode_prompt(turns, images).input_ids)

    def stream(
        self, turns: tuple[Turn, ...], images: tuple[ImageRef, ...], *, max_new_tokens: int
    ) -> Iterator[str]:
        """Yields the answer piece by piece."""
        return stream(
            self.assembled.model,
            self.assembled.encoder,
            Prompt(turns, images),
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )


def load_speaker(
    path: Path,
    *,
    device: str,
    dtype: str,
    temperature: float = 0.0,
    top_p: float = 1.0,
    origin: Origin | None = None,
) -> ModelSpeaker:
    """Loads a model to talk to.

    Args:
        path: Run, checkpoint or exported directory.
        device: Device name.
        dtype: Number format name.
        temperature: 0 for greedy.
        top_p: Nucleus of sampling.
        origin: What a directory of another project does not say itself.

    Raises:
        VistuneError: The model or the device is not there.
    """
    chosen = select_device(device, dtype)
    assembled = load_assembled(
        path, dtype=chosen.dtype, device=chosen.torch_device, origin=origin or Origin()
    )
    return ModelSpeaker(assembled, chosen, temperature=temperature, top_p=top_p)
