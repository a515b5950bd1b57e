"""`vistune compare`: runs with each other, models with the numbers of other implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Compare runs with each other, and models with the numbers of other implementations.",
    no_args_is_help=True,
)


@app.command("parity")
def parity(
    directory: Annotated[
        Path, typer.Argument(help="config.json, weights by their public names, and io*.npz.")
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest error, relative to the largest value of an array; 2e-5, in bf16 5e-2."
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Format of the weights here.")
    ] = "fp32",
) -> None:
    """Compute every array of a reference dump and say how far each one is off."""
    from vistune.cli.console import print_table
    from vistune.compare.parity import FORMATS, compare_directory

    report = compare_directory(directory, tolerance=tolerance, dtype=FORMATS[dtype])
    words = {True: "pass", False: "FAIL", None: "-"}
    rows = [
        (c.file, c.array, c.note, words[c.passed], "" if c.error is None else f"{c.error:.1e}")
        for c in report.checks
    ]
    print_table(f"{report.model}: {directory}", ("file", "array", "", "result", "error"), rows)
    worst = max((c.error for c in report.compared if c.error is not None), default=0.0)
    num_left = len(report.checks) - len(report.compared)
    at = f"{report.tolerance:g}" + ("" if dtype == "fp32" else f" in {dtype}")
    print(
        f"{len(report.compared) - len(report.failed)} of {len(report.compared)} arrays pass at"
        f" {at}, largest error {worst:.1e}; {num_left} are inputs or not compared"
    )
    if report.failed:
        raise typer.Exit(1)


@app.command("runs")
def runs(
    run_a: Annotated[Path, typer.Argument(help="The reference: a run directory.")],
    run_b: Annotated[Path, typer.Argument(help="The run measured against it.")],
    tolerance: Annotated[
        float | None,
        typer.Option(help="Fail when the mean relative error of the losses is larger."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw both curves into this .png, .svg or .pdf file.")
    ] = None,
) -> None:
    """Compare the loss curves and step times of two runs over the same data."""
    from vistune.cli.console import print_table
    from vistune.compare import compare_runs

    found = compare_runs(run_a, run_b)
    at, worst = found.worst
    rows = [
        ("steps in common", str(len(found.steps))),
        ("mean relative error of the loss", f"{found.mean_error:.3%}"),
        ("mean residual (with signs)", f"{found.mean_residual:+.3%}"),
        (f"largest residual (step {at})", f"{worst:+.3%}"),
        ("last tenth of the steps", f"{found.end_residual:+.3%}"),
        ("loss of the first step, A and B", f"{found.losses_a[0]:.4f}  {found.losses_b[0]:.4f}"),
        ("loss of the last step, A and B", f"{found.losses_a[-1]:.4f}  {found.losses_b[-1]:.4f}"),
    ]
    if found.step_time_ratio is not None:
        times = f"{found.step_s_a:.4g}  {found.step_s_b:.4g}"
        rows.append(("median step in s, A and B", times))
        rows.append(("time of a step, B / A", f"{found.step_time_ratio:.3f}"))
    print_table(f"A {run_a}, B {run_b}", ("", "B against A"), rows, numbers=1)
    if found.num_only_a or found.num_only_b:
        print(f"left out: {found.num_only_a} steps only A has, {found.num_only_b} only B has")
    if found.other_data_at is not None:
        print(f"not the same data: token counts differ from step {found.other_data_at} on")
    if plot is not None:
        from vistune.compare.plot import plot_runs

        plot_runs(found, plot, names=(f"A: {run_a.name}", f"B: {run_b.name}"))
        print(f"drawn: {plot}")
    if tolerance is not None:
        passed = found.mean_error <= tolerance and found.other_data_at is None
        print(f"{'within' if passed else 'NOT within'} a tolerance of {tolerance:.3%}")
        if not passed:
            raise typer.Exit(1)
