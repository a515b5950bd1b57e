"""`vistune export`: write a trained model in a form others read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vistune.cli.chat import LanguageBase, SatRows, Template, TowerBase, WholeBase, origin_of


class Target(StrEnum):
    """Forms of an export."""

    HF = "hf"
    ADAPTER = "adapter"
    VISTUNE = "vistune"
    NATIVE = "native"
    SAT = "sat"
    LLAVA = "llava"
    XTUNER = "xtuner"


def export(
    run: Annotated[Path, typer.Argument(help="A run, a checkpoint of it, or a model directory.")],
    to: Annotated[
        Target,
        typer.Option(
            help="hf: a transformers directory (LLaVA, or the model's own class); adapter: PEFT"
            " adapter and connector; vistune:"
            " one self-describing directory, for every model; native: the public layout of a family"
            " (CogVLM2, VisualGLM, MGM); sat: VisualGLM for SwissArmyTransformer;"
            " llava: the original LLaVA's layout; xtuner: XTuner's projector and adapters."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an export already there.")
    ] = False,
    template: Template = None,
    vision_tower: TowerBase = None,
    language_model: LanguageBase = None,
    base_model: WholeBase = None,
    sat_qkv: SatRows = None,
) -> None:
    """Merge adapters and write the model for transformers, PEFT or vistune itself."""
    from vistune.export import export_model, next_step

    written = export_model(
        run,
        to=to.value,
        output=output,
        overwrite=overwrite,
        origin=origin_of(template, vision_tower, language_model, base_model, sat_qkv),
    )
    print(f"written: {written}")
    line = next_step(run, to=to.value, output=written)
    print(f"next: {line}" if line.startswith("vistune") else f"next (in Python): {line}")
