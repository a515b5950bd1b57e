"""`vistune plan`: what a recipe will need, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vistune.cli.recipe import Name, Overrides

if TYPE_CHECKING:
    from vistune.plan import Held, Plan


def plan(
    name: Name,
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="A known device (h200, a100-80, 4090, ...); else this one.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=0, help="Memory of the device in GiB, when it is another.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of an hour of it, for the cost of the run.")
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Read the rows' lengths for the heaviest rows and steps.")
    ] = False,
) -> None:
    """Predict memory, time and cost; choose row length and recomputed layers; read no weights."""
    from vistune.recipe import load_recipe

    recipe = load_recipe(name, overrides or []).recipe
    from vistune.assembly import draw  # imports torch: behind every error of the recipe
    from vistune.models.native import is_native_config
    from vistune.models.native_memory import why_not_predicted
    from vistune.plan import dtype_of, held, make_plan, target_of

    blueprint = draw(recipe)
    whole = blueprint.facts.whole_config
    is_native = whole is not None and is_native_config(whole)
    unknown = why_not_predicted(whole) if is_native else None
    if unknown is not None:
        target = target_of(recipe, device, memory_gib=memory_gib)
        found = held(recipe, blueprint.facts, target, dtype=dtype_of(recipe, target))
        _print_held(found, unknown)
        if not found.can_fit:
            raise typer.Exit(1)
        return
    made = make_plan(
        recipe,
        device=device,
        memory_gib=memory_gib,
        price_per_hour=price,
        read_data=data,
        blueprint=blueprint,
    )
    _print(made, price=price)
    if not made.fits:
        raise typer.Exit(1)


def _print(made: Plan, *, price: float | None) -> None:
    from vistune.cli.console import print_table

    gib = 2**30
    prediction, row = made.prediction, made.row
    patches = f" of {row.num_patches:,} patches" if row.num_patches else ""
    rows = [
        (role, *(f"{n / gib:.2f}" for n in (b.weights, b.gradients, b.optimizer, b.casts)))
        for role, b in prediction.roles.items()
    ]
    print_table(
        "predicted GiB by role", ("role", "weights", "gradients", "optimizer", "casts"), rows
    )
    kinds = [
        ("decoder activations", prediction.activations),
        ("images, tower, connector", prediction.tower),
        ("logits", prediction.logits),
        ("made in passing", prediction.passing),
    ]
    print_table(
        f"and for a row of {row.num_tokens:,} tokens, {row.num_images} images{patches},"
        f" {row.num_targets:,} targets ({'full' if made.which is None else made.which})",
        ("kind", "GiB"),
        [(kind, f"{n / gib:.2f}") for kind, n in kinds],
    )
    for sentence in made.settled.said:
        print(f"chosen: {sentence}")
    layers = "fused" if made.room.memory.fused else "as the model has them"
    print(f"decoder layers: {layers}")
    total = made.device.memory_gib
    verdict = "fits" if made.fits else "does not fit"
    print(f"peak: {prediction.peak_gib:.1f} of {total:.1f} GiB on {made.device.name}: {verdict}")
    if made.row_tflop is not None:
        print(f"needed: {made.row_tflop:,.3g} TFLOP a row, nothing recomputed counted")
    if made.row_seconds is not None:
        tokens_per_s = row.num_tokens / made.row_seconds
        print(f"estimate: {made.row_seconds:.3g} s a row, {tokens_per_s:,.0f} tokens/s")
    _print_run(made, price=price)


def _print_run(made: Plan, *, price: float | None) -> None:
    """Says what a step and the run take, or what it would need to know for that."""
    if made.step_seconds is not None:
        print(f"estimate: {made.step_seconds:.3g} s a step")
    if made.run_seconds is not None:
        print(f"estimate: {made.num_steps:,} steps in {made.run_seconds / 3600:.2f} h")
    elif made.row_seconds is not None:
        print("a step, the run and its cost: add --data, which counts the rows and steps there are")
    if made.cost is not None:
        print(f"estimate: cost {made.cost:,.2f}")
    elif price is not None and made.row_seconds is None:
        print(f"cost: not known, as the speed of {made.device.name} with this model is not")


def _print_held(found: Held, unknown: str) -> None:
    from vistune.cli.console import print_table

    gib = 2**30
    rows = [
        (role, *(f"{n / gib:.2f}" for n in (b.weights, b.gradients, b.optimizer)))
        for role, b in found.roles.items()
    ]
    print_table("GiB by role", ("role", "weights", "gradients", "optimizer"), rows)
    print(f"{found.num_trainable:,} of {found.num_parameters:,} weights train")
    total, device = found.device.memory_gib, found.device.name
    print(f"held whatever the rows are: {found.total / gib:.1f} of {total:.1f} GiB on {device}")
    if not found.can_fit:
        print("does not fit")
        return
    print(
        f"What activations take is not predicted for this model ({unknown}): the first step of a"
        " run is its longest row, so too little memory shows before training starts. Then lower"
        " batch.max_tokens or data.image.max_tokens, or raise train.checkpoint_layers."
    )
