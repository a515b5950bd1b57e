"""What a public directory holds for its own code goes along with a model's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from family_dirs import write_family

from vistune.assembly import load_assembled
from vistune.export import export_model

OTHERS = {
    "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"},
    "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
    "tokenizer_type": "somebody/some-model",
    "quantization_config": None,
}
CONFIGS = {"visualglm-sat": "model_config.json"}


@pytest.mark.parametrize("kind", ["cogvlm2", "visualglm", "visualglm-sat", "mgm-2b"])
def test_settings_and_code_of_the_public_directory_are_kept(tmp_path: Path, kind: str) -> None:
    source = write_family(kind, tmp_path / "any name")
    name, to = CONFIGS.get(kind, "config.json"), "sat" if kind in CONFIGS else "native"
    own = json.loads((source / name).read_text())
    part = next((key for key in ("vision_config", "eva_config", "eva_args") if key in own), None)
    if part is not None:
        own[part]["known_to_its_code"] = 3
    (source / name).write_text(json.dumps({**own, **OTHERS}))
    (source / "modeling_own.py").write_text("raise SystemExit('run')\n")
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    out = export_model(source, to=to, output=tmp_path / "out")  # type: ignore[arg-type]
    written = json.loads((out / name).read_text())
    assert {key: written.get(key) for key in OTHERS} == OTHERS
    assert {key: written[key] for key in own if key != "torch_dtype"} == {
        key: value for key, value in own.items() if key != "torch_dtype"
    }
    assert (out / "modeling_own.py").read_bytes() == (source / "modeling_own.py").read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6}
    again = load_assembled(out).model.state_dict()
    assert again.keys() == load_assembled(source).model.state_dict().keys()
    # Vistune's own directory has other names for the same settings: none of them comes along.
    whole = export_model(out, to="vistune", output=tmp_path / "whole")
    back = export_model(whole, to=to, output=tmp_path / "back")  # type: ignore[arg-type]
    assert "vistune" not in (back / name).read_text()
