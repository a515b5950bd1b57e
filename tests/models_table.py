"""Writes docs/models.md: what each model can do, ticked where the test that shows it passes.

    python tests/models_table.py

runs every test that is named here and writes the page. `tests/test_models_table.py` holds page and
list together.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
COLUMNS = (
    "load original",
    "train full",
    "LoRA",
    "QLoRA",
    "packed",
    "learns",
    "generate",
    "export",
    "parity",
)

_E2E = "tests/test_families_end_to_end.py::"
_LEARN = (
    "tests/test_families_learn.py"
    "::test_twenty_steps_on_photographs_and_answers_with_and_without_a_cache"
)
_OWN = "tests/models/native/"
_OWN_E2E = "tests/test_native_end_to_end.py::"
_PARITY = "tests/compare/test_parity.py::test_reference_dumps_pass"
_LOOP = "tests/train/test_loop.py::"
_PIECES = "tests/models/test_language_pieces.py::"
_PARTIAL = "tests/checkpoint/layouts/test_partial.py"
_LAYOUTS = "tests/export/test_public_layouts.py::"
_TOWER = "tests/export/test_tower.py::test_the_original_llava_comes_back_bit_equal"


@dataclass(frozen=True)
class Shown:
    """A capability and the tests that show it.

    Args:
        tests: Node ids, without parameters for all of a test's.
        note: What the tick does not say.
    """

    tests: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """A capability that no test shows.

    Args:
        reason: Why not.
    """

    reason: str


Cell = Shown | Missing


def _qlora(kind: str) -> Cell:
    tests = (f"{_E2E}test_adapters_beside_rounded_weights[{kind}-{form}]" for form in _ROUNDED)
    return Shown(tuple(tests), _FORMS)


_ROUNDED = ("int8", "nf4")
_FORMS = "int8 and NF4, on a CPU"
_QLORA = Shown(("tests/train/test_qlora.py", "tests/models/tune/test_quantize.py"), _FORMS)


def _internlm2_qlora(start: str) -> Cell:
    tests = (f"{_PIECES}test_internlm2_is_an_ordinary_part[{start}-{form}]" for form in _ROUNDED)
    return Shown(tuple(tests), _FORMS)


def _family(kind: str, dump: str, exports: str, **changes: Cell) -> tuple[Cell, ...]:
    cells: dict[str, Cell] = {
        "load": Shown((f"{_E2E}test_a_family_is_described_by_its_own_files[{kind}]",)),
        "full": Shown((f"{_E2E}test_train_resume_answer_export[{kind}-full]",)),
        "lora": Shown((f"{_E2E}test_train_resume_answer_export[{kind}-lora]",)),
        "qlora": _qlora(kind),
        "packed": Shown((f"{_E2E}test_packed_rows_give_the_loss_of_single_ones[{kind}]",)),
        "learns": Shown((f"{_LEARN}[{kind}]",)),
        "generate": Shown(
            (f"{_LEARN}[{kind}]", f"{_E2E}test_train_resume_answer_export[{kind}-lora]")
        ),
        "export": Shown((f"{_E2E}test_train_resume_answer_export[{kind}-full]",), exports),
        "parity": Shown((f"{_PARITY}[{dump}]",)),
    }
    return tuple((cells | changes).values())


NATIVE = {
    "Qwen2-VL": "qwen2_vl",
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen3-VL": "qwen3_vl",
    "Qwen3-VL with experts": "qwen3_vl_moe",
    "GLM-4.1V": "glm4v",
    "InternVL 2.5 and later": "internvl",
    "Idefics3": "idefics3",
    "SmolVLM": "smolvlm",
    "LLaVA-OneVision": "llava_onevision",
    "MiniCPM-V 4.6": "minicpmv4_6",
    "Gemma 3": "gemma3",
    "Mistral 3": "mistral3",
    "PaddleOCR-VL": "paddleocr_vl",
    "Pixtral": "pixtral",
    "PaliGemma": "paligemma",
    "PaliGemma 2": "paligemma2",
}
"""Transformers' own models and the kinds of `tests/models/native` they are."""


def _native(kind: str) -> tuple[Cell, ...]:
    rounded = (f"{_OWN_E2E}test_adapters_beside_rounded_weights[{kind}-{f}]" for f in _ROUNDED)
    adapted = f"{_OWN_E2E}test_adapters_with_rates_of_their_own[{kind}]"
    whole = f"{_OWN_E2E}test_all_of_it_trains_resumes_and_is_exported[{kind}]"
    experts = "; the experts stay as they are" if kind in _EXPERTS else ""
    adapter = "" if kind in _NO_ADAPTER else "adapter, "
    return (
        Shown((f"{_OWN}test_native.py::test_every_parameter_has_a_role[{kind}]",)),
        Shown((whole,)),
        Shown((adapted,)),
        Shown(tuple(rounded), _FORMS + experts),
        Shown((f"{_OWN}test_native.py::test_packed_is_alone_in_loss_and_gradients[{kind}]",)),
        Shown((f"tests/test_native_learn.py::test_twenty_steps_on_photographs[{kind}]",)),
        Shown(
            (
                f"{_OWN}test_native.py::test_answers_in_a_batch_as_alone_and_as_without_cache[{kind}]",
            )
        ),
        Shown((whole, adapted), f"hf, {adapter}vistune"),
        Shown(
            (f"{_OWN}test_exact.py::test_loss_and_gradients_are_transformers[{kind}]",),
            "loss and every gradient against transformers' own forward pass",
        ),
    )


_EXPERTS = {"qwen3_vl_moe"}
_NO_ADAPTER = {"llava_onevision"}

ROWS: dict[str, tuple[Cell, ...]] = {
    "parts: CLIP + MLP + a Llama-like model": (
        Shown(("tests/models/test_build.py",), "the hub's own directories of tower and model"),
        Shown((f"{_LOOP}test_losses_equal_a_plain_loop_over_transformers[full]",)),
        Shown((f"{_LOOP}test_losses_equal_a_plain_loop_over_transformers[lora]",)),
        _QLORA,
        Shown((f"{_LOOP}test_packed_equals_one_by_one_in_loss_and_gradients",)),
        Shown((f"{_LEARN}[llava-internlm2]",), "with InternLM2 as a Llama"),
        Shown(("tests/generate/test_decode.py::test_greedy_equals_transformers_without_a_cache",)),
        Shown(
            (
                "tests/export/test_export.py",
                "tests/export/test_run.py::test_every_form_answers_like_the_run",
                f"{_LAYOUTS}test_xtuner_adapters_there_and_back",
                f"{_LAYOUTS}test_the_original_llava_there_and_back",
            ),
            "hf, llava, xtuner, adapter, vistune",
        ),
        Shown(
            ("tests/models/test_compose.py",),
            "against transformers' own classes",
        ),
    ),
    "LLaVA-1.5, original layout": (
        Shown(
            (
                "tests/checkpoint/layouts/test_llava_original.py",
                "tests/checkpoint/layouts/test_lora_on_llava.py",
                _PARTIAL,
                f"{_LAYOUTS}test_connectors_of_others",
            ),
            "whole, after LoRA (on Vicuna or on a LLaVA), or `mm_projector.bin` alone",
        ),
        Shown((f"{_E2E}test_train_resume_answer_export[llava-1.5-full]",)),
        Shown((f"{_E2E}test_train_resume_answer_export[llava-1.5-lora]",)),
        _qlora("llava-1.5"),
        Shown((f"{_E2E}test_packed_rows_give_the_loss_of_single_ones[llava-1.5]",)),
        Shown((f"{_LEARN}[llava-1.5]",)),
        Shown((f"{_LEARN}[llava-1.5]", f"{_E2E}test_train_resume_answer_export[llava-1.5-lora]")),
        Shown(
            (
                f"{_E2E}test_train_resume_answer_export[llava-1.5-full]",
                f"{_TOWER}[True-llava-1.5]",
                f"{_TOWER}[False-llava-1.5]",
            ),
            "hf, llava, vistune",
        ),
        Shown((f"{_PARITY}[llava15]",)),
    ),
    "LLaVA-1.6, original layout": (
        Shown(
            (f"{_E2E}test_a_family_is_described_by_its_own_files[llava-1.6]",),
            "also transformers' `llava_next`",
        ),
        Shown((f"{_E2E}test_train_resume_answer_export[llava-1.6-full]",)),
        Shown((f"{_E2E}test_train_resume_answer_export[llava-1.6-lora]",)),
        _qlora("llava-1.6"),
        Shown((f"{_E2E}test_packed_rows_give_the_loss_of_single_ones[llava-1.6]",)),
        Shown((f"{_LEARN}[llava-1.6]",)),
        Shown((f"{_LEARN}[llava-1.6]", f"{_E2E}test_train_resume_answer_export[llava-1.6-lora]")),
        Shown(
            (
                f"{_E2E}test_train_resume_answer_export[llava-1.6-full]",
                "tests/train/test_tiles.py::test_exports_answer_the_same",
                f"{_TOWER}[True-llava-1.6]",
                f"{_TOWER}[False-llava-1.6]",
                "tests/train/test_tiles.py::test_transformers_reads_ids_pixels_and_answers",
                "tests/train/test_tiles.py::test_an_adapter_export_has_the_newline_beside_it",
            ),
            "hf, llava, adapter, vistune",
        ),
        Shown(
            ("tests/models/test_anyres.py::test_equals_transformers_llava_next",),
            "loss and every gradient against transformers' own forward pass",
        ),
    ),
    "InternLM2 as the language model": (
        Shown((f"{_PIECES}test_added_tokens_take_the_places_kept_for_them",)),
        Shown((f"{_PIECES}test_internlm2_is_an_ordinary_part[public-full]",)),
        Shown((f"{_PIECES}test_internlm2_is_an_ordinary_part[public-lora]",)),
        _internlm2_qlora("public"),
        Shown(
            (
                "tests/checkpoint/test_layout_internlm2.py"
                "::test_it_is_an_ordinary_language_part_on_packed_rows",
            )
        ),
        Shown((f"{_LEARN}[llava-internlm2]",)),
        Shown((f"{_LEARN}[llava-internlm2]",)),
        Shown(
            (
                f"{_PIECES}test_internlm2_is_an_ordinary_part[public-full]",
                f"{_LAYOUTS}test_xtuner_with_a_whole_internlm2",
                f"{_LAYOUTS}test_xtuner_with_adapters_of_internlm2",
            ),
            "vistune; xtuner, with adapters or the language model by InternLM2's own names",
        ),
        Shown((f"{_PARITY}[internlm2]",)),
    ),
    "LLaVA-InternLM2, XTuner layout": (
        Shown(
            (
                f"{_LAYOUTS}test_xtuner_adapters_of_internlm2_speak_of_its_own_names",
                f"{_LAYOUTS}test_connectors_of_others",
                f"{_LAYOUTS}test_other_objects_in_a_file_are_never_run",
                _PARTIAL,
            ),
            "its directories, and `iter_*.pth` that hold the projector alone; what they stand on is"
            " in their own configs or in the recipe",
        ),
        Shown((f"{_PIECES}test_internlm2_is_an_ordinary_part[xtuner-full]",)),
        Shown((f"{_PIECES}test_internlm2_is_an_ordinary_part[xtuner-lora]",)),
        _internlm2_qlora("xtuner"),
        Shown(
            (
                "tests/checkpoint/test_layout_internlm2.py"
                "::test_it_is_an_ordinary_language_part_on_packed_rows",
            )
        ),
        Shown((f"{_LEARN}[llava-internlm2]",), "from its parts"),
        Shown((f"{_PIECES}test_internlm2_is_an_ordinary_part[xtuner-lora]",)),
        Shown(
            (
                f"{_LAYOUTS}test_xtuner_with_a_whole_internlm2",
                f"{_LAYOUTS}test_xtuner_with_adapters_of_internlm2",
            ),
            "without XTuner's own Python files",
        ),
        Missing("there is no reference dump of the whole model; its parts have theirs"),
    ),
    "MGM-2B": _family(
        "mgm-2b",
        "mgm_gemma",
        "native, vistune",
        load=Shown(
            (
                f"{_E2E}test_a_family_is_described_by_its_own_files[mgm-2b]",
                "tests/models/test_mgm_parts.py",
            ),
            "whole, or from Gemma, CLIP, OpenCLIP's ConvNeXt and `mm_projector.bin`",
        ),
    ),
    "MGM-2B-HD": _family("mgm-2b-hd", "mgm_gemma", "native, vistune"),
    "CogVLM2-Llama3": _family(
        "cogvlm2",
        "cogvlm2",
        "native, vistune",
        lora=Shown(
            (
                f"{_E2E}test_train_resume_answer_export[cogvlm2-lora]",
                f"{_E2E}test_only_the_visual_experts_of_cogvlm2",
            ),
            "also of the visual experts alone",
        ),
    ),
    "VisualGLM-6B, transformers layout": _family("visualglm", "visualglm", "native, sat, vistune"),
    "VisualGLM-6B, SAT layout": _family(
        "visualglm-sat",
        "visualglm",
        "native, sat, vistune",
        parity=Shown(
            (
                f"{_PARITY}[visualglm]",
                "tests/checkpoint/test_layout_visualglm.py"
                "::test_sat_layout_round_trip_is_bit_equal",
            ),
            "the dump is in the other layout; the weights are the same, bit for bit",
        ),
    ),
    **{f"{name}, transformers' own": _native(kind) for name, kind in NATIVE.items()},
}

_HEAD = """# Models

What works with which model. A tick stands where a test of this repository shows it on weights of
the model's own names and structure at a tiny size; nothing here says how good an answer is. The
page is written by `python tests/models_table.py`, which runs those tests.

- **load original**: the public directory, every tensor accounted for.
- **train full**, **LoRA**, **QLoRA**: a run with that tuning.
- **learns**: twenty steps on photographs bring the loss down.
- **packed**: several samples in a row give the loss of each alone.
- **generate**: answers, token by token with a cache.
- **export**: written and loaded again with equal logits, in the forms named.
- **parity**: every array of a reference dump within 2e-5 (`vistune compare parity`).

"""


def all_tests() -> list[str]:
    """Returns every test that is named, once."""
    cells = [cell for row in ROWS.values() for cell in row if isinstance(cell, Shown)]
    return list(dict.fromkeys(test for cell in cells for test in cell.tests))


def render(failed: frozenset[str] = frozenset()) -> str:
    """Returns the page.

    Args:
        failed: Named tests that did not pass.
    """
    notes: dict[str, int] = {}

    def mark(note: str) -> str:
        return f" [{notes.setdefault(note, len(notes) + 1)}]" if note else ""

    def show(cell: Cell) -> str:
        if isinstance(cell, Missing):
            return "–" + mark(cell.reason)
        if failed & set(cell.tests):
            return "–" + mark("its test does not pass")
        return "✓" + mark(cell.note)

    lines = [f"| model | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(map(show, row))} |" for name, row in ROWS.items()]
    told = [f"{number}. {note}" for note, number in notes.items()]
    return _HEAD + "\n".join(lines) + "\n\n" + "\n".join(told) + "\n"


def run() -> frozenset[str]:
    """Runs the named tests; returns those of which one did not pass, or that are not there."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *all_tests()]
        subprocess.run(command, cwd=ROOT, check=False)
        if not report.is_file():
            return frozenset(all_tests())
        ran: dict[str, bool] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            parts = case.attrib["classname"].split(".")
            while parts and not (ROOT / Path(*parts)).with_suffix(".py").is_file():
                parts.pop()
            node = f"{'/'.join(parts)}.py::{case.attrib['name']}"
            bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
            ran[node] = not bad
    return frozenset(test for test in all_tests() if not _passed(test, ran))


def _passed(test: str, ran: dict[str, bool]) -> bool:
    """Whether every case of a named test passed: of a file, of all its parameters, or of one."""
    starts = (f"{test}::", f"{test}[")
    found = [ok for node, ok in ran.items() if node == test or node.startswith(starts)]
    return bool(found) and all(found)


if __name__ == "__main__":
    not_passed = run()
    PAGE.write_text(render(not_passed), encoding="utf-8")
    for name in sorted(not_passed):
        print(f"did not pass: {name}")
    sys.exit(1 if not_passed else 0)
