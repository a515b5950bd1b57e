"""The values that pass between the engines. No logic, and torch is not imported here.

Shape suffixes used on tensors in models, loss and batches (the one legend):

    B batch (1 for a packed row)   T tokens     D model width    V vocabulary   H heads
    A axes of a position (one, or time, row and column)
    N images                       P patches    K image tokens   M target tokens
    S samples in a row             C channels   Y, X pixel rows and columns
    U positions at which the last layer is read
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

IGNORE_INDEX = -100
"""Label of a position that carries no loss (the field's convention)."""

ROLES: tuple[RoleName, ...] = ("vision", "connector", "language", "head")
"""The four roles that freeze plans, LoRA targets, learning rates and exporters speak of."""

RoleName: TypeAlias = Literal["vision", "connector", "language", "head"]
Speaker: TypeAlias = Literal["system", "user", "assistant"]
ImageShape: TypeAlias = tuple[int, ...]
"""What a model is told of an image beside its pixels; the layout says what they mean."""
Part: TypeAlias = str | int
"""A piece of a turn: text, or the index of an image in `Sample.images`."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where one image is; nothing of it has been decoded.

    Args:
        path: Absolute path, already proved to lie inside the declared image folder; of the
            dataset file where the image stands in that.
        name: The path as the dataset wrote it, for messages.
        span: First byte and number of bytes of the image in `path`; None: the whole file.
        content: The image file itself, where a row carries it; `path` is then not read.
    """

    path: Path
    name: str
    span: tuple[int, int] | None = None
    content: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation: who speaks, and text and images in reading order."""

    speaker: Speaker
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text of the turn, images left out."""
        if len(self.parts) == 1 and isinstance(self.parts[0], str):
            return self.parts[0]
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a dataset, in the form every format is read into.

    Args:
        id: The row's own id, or `<file stem>:<row>` where it has none.
        source: Name of the data source in the recipe.
        where: File and row ("train.json row 17" or "train.jsonl:18"), for messages.
        turns: The conversation; an optional system turn first, then user and assistant in turn.
        images: Images in the order in which the turns refer to them.
        notes: Rules that changed the row when it was read ("leading_answer_dropped", ...), by
            short fixed names, so that they are counted and never silent.
    """

    id: str
    source: str
    where: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was not used, and why. Written to `quarantine.jsonl`, counted by reason.

    Args:
        source: Name of the data source.
        where: File and row.
        id: The row's id, or None when it could not be read.
        reason: A short fixed name ("image_missing", "empty_answer", ...) to count by.
        detail: The sentence a person reads, with numbers.
        fix: What would make the row usable.
    """

    source: str
    where: str
    id: str | None
    reason: str
    detail: str
    fix: str


@dataclass(frozen=True, slots=True)
class VisionGrid:
    """How many tokens an image becomes: a pure function of the pixels the tower is given.

    Args:
        patch_px: Side of the square of input pixels behind one tower position.
        num_extra_tokens: Positions without a patch that are kept (a class token).
        downsample: Side of the square of patches that the connector folds into one token.
        fixed_size_px: The one input side the tower takes, or None where any multiple of
            `patch_px` will do.
    """

    patch_px: int
    num_extra_tokens: int = 0
    downsample: int = 1
    fixed_size_px: int | None = None

    def num_tokens(self, height_px: int, width_px: int) -> int:
        """Returns the image tokens of one tower input of `height_px` x `width_px`."""
        rows = height_px // self.patch_px // self.downsample
        columns = width_px // self.patch_px // self.downsample
        return rows * columns + self.num_extra_tokens


@dataclass(frozen=True, slots=True)
class ImageDefaults:
    """What a vision tower's own preprocessor file says: the values behind `auto` in a recipe.

    Args:
        size_px: Side of the square input.
        mean: Per-channel mean, on pixels in [0, 1].
        std: Per-channel standard deviation, on pixels in [0, 1].
        resample: Pillow's name of the filter.
        mode: How an image becomes a square, as in `data.image.mode`.
    """

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mode: Literal["crop", "pad", "resize"] = "pad"


@dataclass(slots=True)
class EncodedSample:
    """A sample as numbers, ready to pack.

    Args:
        id: Sample id.
        source: Name of the data source.
        input_ids: int64 [T]; every image stands as a run of `image_token_id`.
        target_mask: bool [T]; True where the token is one the model must learn to say.
        pixel_values: Preprocessed images in order, each float32 [3, Y, X]; with an image layout
            each has one more axis in front, of the inputs an image becomes.
        num_image_tokens: Tokens that stand for images, marks around and between them included.
        image_shapes: Of each image, by an image layout; empty without one.
        position_ids: int64 [A, T] where an image layout counts positions in its own way.
        prompt_tokens: Tokens in front of the first target, where the model reads prompts both ways.
    """

    id: str
    source: str
    input_ids: npt.NDArray[np.int64]
    target_mask: npt.NDArray[np.bool_]
    pixel_values: list[npt.NDArray[np.float32]] = field(default_factory=list)
    num_image_tokens: int = 0
    image_shapes: tuple[ImageShape, ...] = ()
    position_ids: npt.NDArray[np.int64] | None = None
    prompt_tokens: int | None = None


@dataclass(slots=True)
class Tail:
    """Where the output of a row's last layer is read: from each sample's first target on.

    Args:
        index_U: int64 [U]; positions in T, for each sample a run that ends with the sample.
        cu_seqlens: int32 [S + 1]; the runs' boundaries in U.
        max_seqlen: Length of the longest run.
        target_index_M: int64 [M]; positions in U whose next token is a target.
    """

    index_U: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    target_index_M: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Tail:
        """Returns the same with its tensors on `device`."""
        return Tail(
            index_U=self.index_U.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            max_seqlen=self.max_seqlen,
            target_index_M=self.target_index_M.to(device, non_blocking=non_blocking),
        )


@dataclass(slots=True)
class Batch:
    """One packed row: samples end to end, no padding, plus the bookkeeping of its samples.

    Labels never enter the model: `target_index` says at which positions a hidden state predicts a
    target token and `target_ids` which token that is (the shift is already done).

    Args:
        input_ids_BT: int64 [1, T].
        position_ids_BT: int64 [1, T]; restarts at 0 with every sample. [A, 1, T] for a model whose
            positions have several axes.
        cu_seqlens: int32 [S + 1]; sample s covers positions cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: Length of the longest sample.
        target_index_M: int64 [M]; positions in T whose next token is a target.
        target_ids_M: int64 [M]; those tokens.
        target_sample_M: int64 [M]; the sample (0..S-1) each target belongs to.
        pixel_values_NCYX: float32 [N, 3, Y, X], or None when the row has no image. With an image
            layout: what its images become, end to end on the first axis.
        sample_ids: Ids of the S samples.
        sources: Source name of each of the S samples.
        num_image_tokens: Image tokens in the row.
        rejected: Samples planned for this row that could not be read.
        read_s: Seconds the worker spent making this row.
        image_shapes: Of each image, by an image layout; empty without one.
        prompt_lengths: Tokens of each sample's prompt, where the model reads prompts both ways;
            empty otherwise.
    """

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    target_index_M: torch.Tensor
    target_ids_M: torch.Tensor
    target_sample_M: torch.Tensor
    pixel_values_NCYX: torch.Tensor | None
    sample_ids: tuple[str, ...]
    sources: tuple[str, ...]
    num_image_tokens: int
    rejected: tuple[Rejected, ...] = ()
    read_s: float = 0.0
    image_shapes: tuple[ImageShape, ...] = ()
    prompt_lengths: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in the row, image tokens included."""
        return int(self.input_ids_BT.shape[1])

    @property
    def num_targets(self) -> int:
        """Target tokens in the row."""
        return int(self.target_ids_M.shape[0])

    @property
    def num_samples(self) -> int:
        """Samples in the row."""
        return len(self.sample_ids)

    def _map(self, change: Mapping[str, torch.Tensor | None]) -> Batch:
        return replace(self, **change)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the row's tensors by field name."""
        named = {
            "input_ids_BT": self.input_ids_BT,
            "position_ids_BT": self.position_ids_BT,
            "cu_seqlens": self.cu_seqlens,
            "target_index_M": self.target_index_M,
            "target_ids_M": self.target_ids_M,
            "target_sample_M": self.target_sample_M,
        }
        if self.pixel_values_NCYX is not None:
            named["pixel_values_NCYX"] = self.pixel_values_NCYX
        return named

    def model_inputs(self) -> dict[str, Any]:
        """Returns what a model is given, by argument of `VisionLanguageModel.hidden_states`."""
        inputs: dict[str, Any] = {
            "input_ids_BT": self.input_ids_BT,
            "position_ids_BT": self.position_ids_BT,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "pixel_values_NCYX": self.pixel_values_NCYX,
        }
        if self.image_shapes:
            inputs["image_shapes"] = self.image_shapes
        if self.prompt_lengths:
            inputs["prompt_lengths"] = self.prompt_lengths
        return inputs

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Returns the row with its tensors on `device`."""
        return self._map(
            {k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors().items()}
        )

    def pin_memory(self) -> Batch:
        """Returns the row with its tensors in page-locked memory (the loader's protocol)."""
        return self._map({k: v.pin_memory() for k, v in self.tensors().items()})
