"""`vistune chat`: talk to a model in the terminal."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vistune.assembly import Origin

Model = Annotated[
    Path,
    typer.Argument(help="A run, a checkpoint of it, or a model directory of any known layout."),
]
Template = Annotated[
    str | None, typer.Option("--template", help="Chat template, where the model brings none.")
]
TowerBase = Annotated[
    str | None,
    typer.Option(
        "--vision-tower",
        help="Encoder that trained pieces stand on, or where a run's is now if it was moved.",
    ),
]
LanguageBase = Annotated[
    str | None,
    typer.Option("--language-model", help="Language model that it stands on, likewise."),
]

WholeBase = Annotated[
    str | None,
    typer.Option("--base-model", help="Where the whole model of a run is now, if it was moved."),
]


class SatOrder(StrEnum):
    """Orders of rows in SwissArmyTransformer's layout."""

    BLOCKS = "blocks"
    BY_HEAD = "by_head"


SatRows = Annotated[
    SatOrder | None,
    typer.Option(
        "--sat-qkv", help="VisualGLM in SwissArmyTransformer's layout: by_head before July 2023."
    ),
]


def origin_of(
    template: str | None,
    vision_tower: str | None,
    language_model: str | None,
    base_model: str | None,
    sat_qkv: SatOrder | None,
) -> Origin:
    """Returns what a person says of a directory that it does not say itself."""
    from vistune.assembly import Origin
    from vistune.recipe import BasesConfig

    bases = BasesConfig(vision_tower=vision_tower, language_model=language_model, model=base_model)
    return Origin(bases, template, None if sat_qkv is None else sat_qkv.value)


DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps or npu.")]
DtypeName = Annotated[str, typer.Option("--dtype", help="auto, fp32 or bf16.")]


def chat(
    model: Model,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Image to talk about; repeatable.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask this one question and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest this much.")
    ] = 1.0,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    template: Template = None,
    vision_tower: TowerBase = None,
    language_model: LanguageBase = None,
    base_model: WholeBase = None,
    sat_qkv: SatRows = None,
) -> None:
    """Talk to a model about images. Lines are read from a pipe as well as from a terminal."""
    from vistune.chat.terminal import ChatOptions, run_chat

    options = ChatOptions(
        images=tuple(image or ()),
        prompt=prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        device=device,
        dtype=dtype,
        origin=origin_of(template, vision_tower, language_model, base_model, sat_qkv),
    )
    raise typer.Exit(run_chat(model, options))
