"""The recipe: every setting of a run, as types. What a key means is written under it.

Nothing here touches a device or reads weights: a recipe error answers in milliseconds.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from vistune.recipe.base import (
    Auto,
    Frac,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from vistune.recipe.model import ModelConfig
from vistune.recipe.offload import OffloadConfig

FrozenFormat: TypeAlias = Literal["same", "fp8", "int8", "nf4"]


class FreezeTune(Section):
    """The role's weights stay as they are."""

    mode: Literal["freeze"] = "freeze"
    """Train nothing."""
    frozen_format: FrozenFormat = "same"
    """Format the frozen weights of linear layers are held in: `same` as `dtype`; `fp8` (language
    only: row-wise scales, products in FP8 forward and backward; needs a device that multiplies
    FP8); `int8` or `nf4` (language and vision: 8 or about 4 bits a weight by bitsandbytes, products
    in `dtype`: for small cards; needs the extra `qlora`). Checkpoints hold adapters only, and
    exports merge them into the weights as they were loaded."""


class FullTune(Section):
    """All weights of the role are trained."""

    mode: Literal["full"]
    """Train every weight."""
    lr: PositiveFloat | None = None
    """Learning rate of this role; `train.lr` when left out."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of this role; `train.weight_decay` when left out."""


class LoraTune(Section):
    """Low-rank adapters are trained beside the role's frozen linear layers."""

    mode: Literal["lora"]
    """Train LoRA adapters."""
    rank: PositiveInt = 64
    """Rank of the two factors."""
    alpha: PositiveFloat = 128.0
    """Scale: the adapter's output is multiplied by alpha / rank (alpha / sqrt(rank), `rslora`)."""
    dropout: Frac = 0.0
    """Dropout in front of the adapter."""
    targets: Literal["all_linear"] | tuple[str, ...] = "all_linear"
    """`all_linear`, or names of the role's linear layers, with `*` for any part: `[q_proj,
    v_proj]`, `["self_attn.*"]`, `["layers.0.*", "*.mlp.down_proj"]`. A name is matched from one of
    its parts on. The language model's head is a role of its own and never among them."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Only in these layers, by their number from 0; all when left out."""
    rslora: bool = False
    """Rank-stabilised scale."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA)."""
    frozen_format: FrozenFormat = "same"
    """Format the frozen weights beside the adapters are held in; see `freeze`."""
    lr: PositiveFloat | None = None
    """Learning rate of this role; `train.lr` when left out."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of this role; `train.weight_decay` when left out."""


RoleTune: TypeAlias = Annotated[FreezeTune | FullTune | LoraTune, Field(discriminator="mode")]


class TuneConfig(Section):
    """What trains, role by role."""

    vision: RoleTune = FreezeTune()
    """The vision tower."""
    connector: RoleTune = FullTune(mode="full")
    """The connector: `freeze` or `full`."""
    language: RoleTune = FreezeTune()
    """The language model without its output head (input embeddings included)."""
    head: RoleTune = FreezeTune()
    """The output head: `freeze` or `full`. A head tied to the embeddings follows `language`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("connector", "head"):
            if getattr(self, name).mode == "lora":
                raise ValueError(f"tune.{name} takes freeze or full, not lora")
        for name in ("connector", "head"):
            tune = getattr(self, name)
            if tune.mode != "full" and tune.frozen_format != "same":
                raise ValueError(
                    f"tune.{name}.frozen_format is 'same'; only language and vision take another"
                )
        if self.held_format("vision") == "fp8":
            raise ValueError("tune.vision.frozen_format takes same, int8 or nf4; fp8 is language's")
        return self

    def held_format(self, role: Literal["vision", "language"]) -> FrozenFormat:
        """Returns the format a role's frozen linear weights are held in; `same` if all train."""
        tune: RoleTune = {"vision": self.vision, "language": self.language}[role]
        return "same" if tune.mode == "full" else tune.frozen_format


class UrlConfig(Section):
    """How images on the network are fetched: over http(s) only, each once, into a cache."""

    max_bytes: PositiveInt = 20_000_000
    """Longer answers are refused."""
    timeout_s: PositiveFloat = 20.0
    """Seconds for one image, redirects included."""
    types: tuple[str, ...] = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp")
    """Content types that are taken."""
    max_redirects: NonNegativeInt = 3
    """Redirects followed; each address is checked anew."""
    private_hosts: tuple[str, ...] = ()
    """Hosts (`name:port`) that may have a private address, such as an image server of your own.
    All others must have a public one."""
    cache: str | None = None
    """Folder the images are kept in; the user's cache folder when left out."""


class SourceConfig(Section):
    """One dataset."""

    name: str | None = None
    """Name in metrics and messages; the file's stem when left out."""
    format: Literal[
        "llava",
        "sharegpt",
        "messages",
        "xtuner",
        "alpaca",
        "visualglm",
        "data_juicer",
        "coco_captions",
        "cogvlm_sft",
        "webdataset",
        "image_folder",
        "captions_csv",
    ] = "llava"
    """How the file is written. JSON lists, JSONL or Parquet: `llava` (`conversations` of `from` and
    `value`, `image`), `sharegpt` (the same with `images`), `messages` (OpenAI and hub chats),
    `xtuner` (`conversation` of `input` and `output`), `alpaca` (`instruction`, `input`, `output`),
    `visualglm` (`img`, `prompt`, `label`), `data_juicer` (`text`, `images`). One object:
    `coco_captions`. A folder of labels: `cogvlm_sft`. A tar file, a folder of them or a pattern
    such as `train-{000..127}.tar`: `webdataset`. A folder of images with a text file beside each:
    `image_folder`. Image names and captions: `captions_csv`."""
    path: str
    """The dataset file, relative to the working directory."""
    images: str | None = None
    """Folder the rows' image paths are relative to; no image may lie outside it. Left out: the
    folder of `path`."""
    epochs: PositiveFloat = 1.0
    """How often the source is seen in one epoch of the run: 2 repeats it, 0.5 takes half."""
    weight: PositiveFloat | None = None
    """The source's share of an epoch, relative to the other sources' weights. Given for all sources
    or none; an epoch then has as many samples as all sources together, and `epochs` is left out."""
    max_samples: PositiveInt | None = None
    """Most samples taken from the source in one epoch; the next epoch goes on where it ended."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    urls: UrlConfig | None = None
    """Lets rows name images by http(s) addresses. Left out, such rows are unusable."""


class ImageConfig(Section):
    """How pixels reach the tower. `auto` is what the tower's own preprocessor file says."""

    mode: Literal["crop", "pad", "resize"] | Auto = "auto"
    """`crop`: short side to `size_px`, centre square. `pad`: to a square with the mean colour, then
    to `size_px`. `resize`: to the square, aspect not kept. `auto`: that of the model gone on from,
    `pad` for one put together from parts."""
    size_px: PositiveInt | Auto = "auto"
    """Side of the square the tower sees."""
    mean: tuple[float, float, float] | Auto = "auto"
    """Per-channel mean on pixels in [0, 1]."""
    std: tuple[float, float, float] | Auto = "auto"
    """Per-channel standard deviation on pixels in [0, 1]."""
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] | Auto = "auto"
    """Filter of the resize."""
    max_tokens: PositiveInt | Auto = "auto"
    """Most tokens one image may become, for models that take images at their own shape; larger
    ones are shrunk or cut into fewer tiles. `auto`: as the model's processor says."""
    max_pixels: PositiveInt = 178_956_970
    """Images with more pixels than this are refused before they are decoded."""
    decode: Literal["exact", "fast", "scaled"] = "exact"
    """`exact`: the bits of transformers' Pillow processors. `fast`: the same steps on vector units;
    a pixel may differ by 2 of 255 levels. `scaled`: also lets libjpeg decode at half the size or
    less where that is still twice what is needed: fine texture then differs by several levels. The
    checkpoint keeps the choice, so that answering uses it too."""


class DataConfig(Section):
    """What is learnt from."""

    train: tuple[SourceConfig, ...]
    """The datasets."""
    template: str = "auto"
    """Chat template: plain, vicuna_v0, vicuna_v1, llama_2, mpt, chatml, internlm2_chat, qwen,
    llama3, gemma, cogvlm2_chat, cogvlm2_vqa, cogvlm2_base, visualglm_zh, visualglm_en, paligemma
    (one prompt and its answer), or `tokenizer` for the tokenizer's own. `auto`: the tokenizer's
    own, or that of the model family or checkpoint gone on from."""
    system: str | None = None
    """System prompt; the template's default when left out."""
    image: ImageConfig = ImageConfig()
    """Preprocessing of images."""
    overlong: Literal["error", "drop", "drop_turn", "shrink_image", "truncate_text"] = "error"
    """A row longer than `batch.max_tokens`. `error`: stop. `drop`: set it aside. `drop_turn`: leave
    out its last rounds, with their images. `shrink_image`: make its images smaller, where the model
    takes images of any size. `truncate_text`: cut its end, never inside an image. A row that still
    does not fit, or would lose every target token, is set aside."""
    max_dropped_frac: Frac = 0.0
    """Fraction of rows that may be set aside before the run stops."""
    shuffle: bool = True
    """A new order every epoch, from `seed`; False keeps the files' order."""
    group_by: Literal["none", "length", "modality"] = "none"
    """Which samples share a step. `length`: about equally long ones. `modality`: only ones with
    images, or only ones without, so that no device waits for another's vision tower. Steps still
    come in random order."""
    workers: NonNegativeInt = 2
    """Processes that read, encode and pack; 0 does it in the training process."""

    @field_validator("train")
    @classmethod
    def _at_least_one(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        if not value:
            raise ValueError("name at least one dataset")
        weighted = [source.weight is not None for source in value]
        if any(weighted) and not all(weighted):
            raise ValueError("give every dataset a weight, or none")
        if any(weighted) and any(source.epochs != 1 for source in value):
            raise ValueError("with weights, epochs has no effect: leave it out")
        return value


class BatchConfig(Section):
    """How much one forward pass and one optimizer step hold."""

    max_tokens: PositiveInt | Auto = 4096
    """Tokens in one packed row (image tokens included), which is one forward pass. `auto`: as many
    as the device's memory holds by `vistune plan`, at most 32,768 (4,096 on a CPU)."""
    samples: PositiveInt | None = None
    """Samples in one optimizer step, over all rows and devices."""
    tokens: PositiveInt | None = None
    """Tokens in one optimizer step, about, over all rows and devices."""
    pack: bool = True
    """Pack samples end to end. False gives every sample a row of its own."""
    max_image_tokens: PositiveInt | None = None
    """Most image tokens in one row, which bounds what the vision tower holds; no bound when left
    out."""
    max_text_tokens: PositiveInt | None = None
    """Most text tokens in one row; no bound when left out."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.samples is None) == (self.tokens is None):
            raise ValueError("set exactly one of batch.samples and batch.tokens")
        fixed = self.max_tokens != "auto"
        if fixed and self.tokens is not None and self.tokens < self.row_tokens:
            raise ValueError(
                f"batch.tokens ({self.tokens}) is less than one row, batch.max_tokens"
                f" ({self.max_tokens})"
            )
        return self

    @property
    def row_tokens(self) -> int:
        """Tokens in one packed row, once `auto` is settled."""
        assert self.max_tokens != "auto", "batch.max_tokens was not settled"
        return self.max_tokens


class TrainConfig(Section):
    """The optimizer and its schedule."""

    epochs: PositiveFloat | None = None
    """Passes over the data. Exactly one of `epochs` and `steps`."""
    steps: PositiveInt | None = None
    """Optimizer steps."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of roles that name none."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of roles that name none; norms and biases never decay."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw` keeps 8 bytes of state for each trained weight. `adamw_8bit` (bitsandbytes, extra
    `qlora`) keeps about 2: small tensors stay in 32 bit; the loss curve differs slightly."""
    betas: tuple[Frac, Frac] = (0.9, 0.999)
    """AdamW's two decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_frac: Frac = 0.03
    """Fraction of the steps in which the rate rises linearly from 0 (rounded up)."""
    min_lr_frac: Frac = 0.0
    """Where cosine and linear end, as a fraction of the peak."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; null turns clipping off."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm that is not finite: stop before the optimizer step, or skip the step
    (and the schedule with it) and count it."""
    max_skipped_steps: NonNegativeInt = 10
    """With `nonfinite: skip`: more than this many stop the run."""
    checkpoint_layers: NonNegativeInt | Auto = 0
    """Language-model layers whose activations are recomputed in the backward pass, from the first
    layer on; saves memory, costs time. `auto`: as few as `vistune plan` says will fit."""
    checkpoint_tower_layers: NonNegativeInt = 0
    """Blocks of the vision tower whose activations are recomputed, from the first on; only for a
    tower that trains, as a frozen one keeps none."""
    offload: OffloadConfig = OffloadConfig()
    """What waits in the host's memory."""
    fused: Literal["auto", "on", "off"] = "auto"
    """Run the language model's layers as fused functions: less time and memory, the same numbers.
    `auto`: on CUDA where the model has it, and said when not; `on`: an error when not."""
    attention: Literal["auto", "varlen", "cudnn", "flex", "sdpa", "npu", "flash_attn"] = "auto"
    """How attention over packed rows is computed. `varlen`: torch's own kernel (CUDA and ROCm, 16
    bit). `cudnn`: cuDNN's kernels for ragged rows, about a third faster on Hopper (package
    nvidia-cudnn-frontend, extra `cudnn`). `flex`: torch's FlexAttention,
    compiled (CUDA; also capped scores). `sdpa`: one call for each sample, everywhere. `npu`:
    Ascend's fused attention (written against its interface, never run on the device).
    `flash_attn`: the package of that name (extra `flash`; written against its interface, not run
    with it yet). `auto`: the fastest that suits model and device, said with the reason at the start
    and in `provenance.jsonl`; one named here that does not suit is an error. The vision tower,
    whose images are a plain batch, takes the one named here where it can, said when it cannot."""
    kernels: Literal["auto", "liger", "torch"] = "auto"
    """Norms and gates of decoder layers that do not run fused. `liger`: liger-kernel's, where
    Triton runs (extra `kernels`). `torch`: transformers' own. `auto`: liger where it is installed
    and runs, said when not. Numbers differ by rounding: 1e-5 in fp32, 2e-2 of the largest in
    bf16."""
    compile: Literal[False, "blocks", "static_blocks"] = False
    """torch.compile. `blocks`: each decoder layer that does not run fused, and each block of the
    tower; rows may have any length. `static_blocks`: the same, with every row padded to
    `batch.max_tokens` by a sample without loss. Slower in the first steps by minutes; whether it
    pays at all is in bench/README.md."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Arithmetic inside matrix products. `highest` is fp32 throughout, also where the parts of a
    long 16-bit product are added; `high` and `medium` let torch add these in 16 bits and take TF32
    or bf16 for fp32 products where the device has them, and another library's fp32 kernels where
    it has not, which can be faster by themselves."""
    threads: PositiveInt | None = None
    """CPU threads for arithmetic; torch's own choice when left out."""

    @field_validator("fused", mode="before")
    @classmethod
    def _on_and_off(cls, value: object) -> object:
        """YAML reads on and off without quotes as true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("set exactly one of train.epochs and train.steps")
        return self

    @model_validator(mode="after")
    def _offload_has_effect(self) -> Self:
        if self.offload.activations and self.compile:
            raise ValueError("train.offload.activations does not work with train.compile")
        if self.offload.activations and self.checkpoint_layers == 0:
            raise ValueError(
                "train.offload.activations moves the inputs of recomputed layers, and there are"
                " none: set train.checkpoint_layers"
            )
        if self.offload.optimizer and self.optimizer != "adamw":
            raise ValueError(f"train.offload.optimizer is for adamw, not {self.optimizer}")
        return self


class SaveConfig(Section):
    """Checkpoints."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints; null saves only at the end."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints are kept."""


class LogConfig(Section):
    """What is written while training."""

    every_steps: PositiveInt = 1
    """Steps between lines of `metrics.jsonl` (and TensorBoard)."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    progress: bool = True
    """Show a live progress bar on a terminal."""


class SampleAnswersConfig(Section):
    """Answers to fixed questions while training, to watch the model learn."""

    every_steps: PositiveInt | None = None
    """Steps between answers; null answers only before the first and after the last step."""
    prompts: tuple[str, ...] = ()
    """Questions; each is asked of each image (or of no image when `images` is empty)."""
    images: tuple[str, ...] = ()
    """Image files."""
    max_new_tokens: PositiveInt = 64
    """Longest answer. Decoding is greedy, so that answers can be compared."""


class Recipe(Section):
    """One training run, whole."""

    name: str
    """Name of the run; its directory is `runs/<name>` unless `run_dir` says otherwise."""
    description: str = ""
    """One sentence for `vistune recipe list`."""
    seed: NonNegativeInt = 0
    """Seeds weights, data order and dropout."""
    run_dir: str | None = None
    """Directory of the run."""
    device: Literal["auto", "cpu", "cuda", "mps", "npu"] = "auto"
    """`auto` takes the first accelerator present, else the CPU. ROCm and DCU are `cuda`."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of weights and activations. `auto`: bf16 where the device has it in hardware,
    fp32 on a CPU. Weights that train are kept in fp32 either way."""
    model: ModelConfig
    """The model."""
    tune: TuneConfig = TuneConfig()
    """What trains."""
    data: DataConfig
    """The data."""
    batch: BatchConfig
    """Row and step sizes."""
    train: TrainConfig
    """Optimizer and schedule."""
    save: SaveConfig = SaveConfig()
    """Checkpoints."""
    log: LogConfig = LogConfig()
    """Metrics."""
    sample: SampleAnswersConfig = SampleAnswersConfig()
    """Sample answers."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("use letters, digits, '.', '_' and '-' only")
        return value

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if all(tune.mode == "freeze" for _, tune in self.tune):
            raise ValueError("every role is frozen: nothing would train; set tune.<role>.mode")
        if self.train.checkpoint_tower_layers and self.tune.vision.mode == "freeze":
            raise ValueError(
                "train.checkpoint_tower_layers has no effect on a frozen tower, which keeps nothing"
            )
        return self
