from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_parts import VOCAB, composed, encoder, packed_logits, row, text_config
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from vistune._version import __version__
from vistune.assembly import load_assembled
from vistune.checkpoint.layouts import describe_directory, load_directory
from vistune.checkpoint.manifest import Manifest, read_manifest
from vistune.checkpoint.merge import merge_adapters
from vistune.data.encode import Encoder
from vistune.data.image import ImagePlan
from vistune.data.template import TEMPLATES
from vistune.data.template.jinja import JinjaTemplate
from vistune.data.template.pieces import PieceTemplate
from vistune.errors import CheckpointError, ModelError, TemplateError
from vistune.export.adapter import write_adapter
from vistune.export.files import new_directory
from vistune.export.hf import compare_hf, write_hf
from vistune.export.jinja import chat_template
from vistune.export.vistune_model import write_vistune
from vistune.generate import Prompt, generate
from vistune.models.compose import ComposedVLM
from vistune.models.tune import apply_tuning
from vistune.recipe import ImageConfig, TuneConfig
from vistune.types import Turn

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 57, 3), dtype=np.uint8))
TURNS = (Turn("user", (0, "\nWhat is it?")),)
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}],
    }
]
MODES = ("crop", "pad", "resize")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def with_mode(coder: Encoder, facts: Any, mode: str) -> Encoder:
    plan = ImagePlan.resolve(ImageConfig(mode=mode), facts.image_defaults)  # type: ignore[arg-type]
    return Encoder(
        tokenizer=coder.tokenizer,
        template=coder.template,
        image_plan=plan,
        grid=coder.grid,
        image_token_id=coder.image_token_id,
    )


CASES = [
    # vision, layer, language model, image mode
    ("clip", -2, "llama", "pad"),
    ("clip", -1, "qwen2", "crop"),
    ("clip", -2, "gemma", "resize"),
    ("clip", -2, "llama_tied", "pad"),
    ("siglip", -1, "qwen3", "resize"),
    ("siglip", -2, "mistral", "pad"),
]


@pytest.mark.parametrize(("vision", "layer", "text", "mode"), CASES)
def test_transformers_llava_answers_the_same(
    shelf: Path, tmp_path: Path, vision: str, layer: int, text: str, mode: str
) -> None:
    model, facts = composed(shelf, vision=vision, text=text, tower={"layer": layer})
    coder = with_mode(encoder(facts), facts, mode)
    write_hf(model, coder, tmp_path)
    assert compare_hf(model, coder, tmp_path) < 1e-5

    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # Where torchvision is installed it would be taken, and its resize gives other pixels.
    processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor).__name__ == "LlavaProcessor"
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    inputs = processor(text=prompt, images=PICTURE, return_tensors="pt")
    ours = coder.encode_prompt(TURNS, [PICTURE])
    assert inputs["input_ids"][0].tolist() == ours.input_ids.tolist()
    np.testing.assert_array_equal(inputs["pixel_values"][0].numpy(), ours.pixel_values[0])
    answer = theirs.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    said = processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [said] == generate(model, coder, [Prompt(TURNS, [PICTURE])], max_new_tokens=12)


@pytest.mark.parametrize("text", ["llama", "llama_tied"])
def test_exported_llava_reads_back(shelf: Path, tmp_path: Path, text: str) -> None:
    model, facts = composed(shelf, text=text)
    write_hf(model, encoder(facts), tmp_path)
    again_facts = describe_directory(tmp_path)
    assert again_facts.image_defaults == facts.image_defaults
    assert again_facts.grid == facts.grid
    again = load_directory(tmp_path, again_facts, dtype=torch.float32)
    made = row(facts)
    for a, b in zip(packed_logits(model, made), packed_logits(again, made), strict=True):
        torch.testing.assert_close(b[:, : a.shape[1]], a, atol=1e-5, rtol=1e-5)


def test_names_are_the_hubs(shelf: Path, tmp_path: Path) -> None:
    model, facts = composed(shelf)
    write_hf(model, encoder(facts), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        starts = {".".join(name.split(".")[:2]) for name in file.keys()}  # noqa: SIM118
    assert starts == {
        "vision_tower.vision_model",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "language_model.model",
        "language_model.lm_head",
    }


def test_image_token_outside_the_vocabulary_widens_the_table(shelf: Path, tmp_path: Path) -> None:
    model, facts = composed(shelf)
    model.image_token_id = VOCAB + 3
    coder = encoder(facts)
    write_hf(model, coder, tmp_path)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert theirs.get_input_embeddings().weight.shape[0] == VOCAB + 4
    assert theirs.lm_head.weight.shape[0] == VOCAB + 4
    assert theirs.generation_config.suppress_tokens == [VOCAB, VOCAB + 1, VOCAB + 2, VOCAB + 3]


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ({"vision": "dinov2"}, "dinov2"),
        ({"vision": "siglip"}, "final norm"),
        ({"connector": {"kind": "linear"}}, "connector linear"),
        ({"connector": {"pixel_shuffle": 2}}, "pixel_shuffle 2"),
        ({"text": "gemma2"}, "final_logit_softcapping"),
        ({"text": "gpt2"}, "gpt2"),
        ({"text": "phi"}, "a bias"),
    ],
)
def test_models_that_are_no_llava(
    shelf: Path, tmp_path: Path, kinds: dict[str, Any], reason: str
) -> None:
    model, facts = composed(shelf, **kinds)
    with pytest.raises(ModelError) as caught:
        write_hf(model, encoder(facts), tmp_path)
    assert reason in str(caught.value) and "--to vistune" in str(caught.value)


def test_vistune_directory_is_whole(shelf: Path, tmp_path: Path) -> None:
    model, facts = composed(shelf, vision="dinov2", text="gemma2")
    coder = encoder(facts)
    manifest = Manifest(vistune_version=__version__, kind="model", encoder=coder.to_state())
    write_vistune(model, coder, manifest, tmp_path)
    again_facts = describe_directory(tmp_path)
    again = load_directory(tmp_path, again_facts, dtype=torch.float32)
    made = row(facts)
    for a, b in zip(packed_logits(model, made), packed_logits(again, made), strict=True):
        assert torch.equal(a, b)
    again_coder = Encoder.from_state(read_manifest(tmp_path).encoder, again_facts.tokenizer)
    prompts = [Prompt(TURNS, [PICTURE])]
    assert generate(again, again_coder, prompts, max_new_tokens=8) == generate(
        model, coder, prompts, max_new_tokens=8
    )


def _adapted(shelf: Path) -> tuple[ComposedVLM, Encoder, dict[str, Any]]:
    model, facts = composed(shelf)
    tune = {"language": {"mode": "lora", "rank": 2, "dora": True}}
    apply_tuning(model, TuneConfig.model_validate(tune), seed=0)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("connector"):
                parameter.normal_(std=0.1)
    return model.eval(), encoder(facts), tune


def test_adapter_directory_loads_in_peft(shelf: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, coder, tune = _adapted(shelf)
    config = parts_of(shelf)
    manifest = Manifest(vistune_version=__version__, kind="checkpoint", parts=config, tune=tune)
    write_adapter(model, coder, manifest, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(shelf / "text_llama")
    theirs = PeftModel.from_pretrained(base, tmp_path / "language_model").eval()
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "language_model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(shelf / "text_llama")
    assert settings["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    with safe_open(tmp_path / "connector.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("connector.0.weight"), model.connector[0].weight)


def parts_of(shelf: Path) -> Any:
    from tiny_parts import parts

    return parts(shelf)


def test_adapters_alone_are_refused_when_more_was_trained(shelf: Path, tmp_path: Path) -> None:
    model, coder, tune = _adapted(shelf)
    manifest = Manifest(
        vistune_version=__version__, kind="checkpoint", tune=tune | {"head": {"mode": "full"}}
    )
    with pytest.raises(ModelError, match="head weights were trained in full"):
        write_adapter(model, coder, manifest, tmp_path / "a")
    merge_adapters(model)
    manifest = Manifest(vistune_version=__version__, kind="checkpoint", tune=tune)
    with pytest.raises(ModelError, match="no adapters"):
        write_adapter(model, coder, manifest, tmp_path / "b")


def test_unmerged_adapters_are_not_exported(shelf: Path, tmp_path: Path) -> None:
    model, coder, _ = _adapted(shelf)
    with pytest.raises(ModelError, match="not merged"):
        write_hf(model, coder, tmp_path)


def test_llava_made_by_transformers_is_read(tmp_path: Path, shelf: Path) -> None:
    from tiny_parts import PREPROCESSOR, tokenizer, vision_model

    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_model("clip").config,
            text_config=text_config("llama"),
            image_token_index=259,
            vision_feature_layer=-2,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)  # in the names transformers gives a model made from a config
    tokenizer(image_token=True).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    facts = describe_directory(tmp_path)
    assert facts.image_token_id == 259
    ours = load_directory(tmp_path, facts, dtype=torch.float32)
    made = row(facts)
    for ids, image, found in zip(made.ids, made.images, packed_logits(ours, made), strict=True):
        expected = theirs(input_ids=ids[None], pixel_values=image).logits[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_template_of_transformers_llava(tmp_path: Path) -> None:
    from tiny_parts import PREPROCESSOR, tokenizer, vision_model

    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_model("clip").config,
            text_config=text_config("llama"),
            image_token_index=259,
        )
    ).save_pretrained(tmp_path)
    tokenizer(image_token=True).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    # Without one it is Vicuna's; the processor's own goes first, in whichever file it stands.
    assert load_assembled(tmp_path).encoder.template.name == "vicuna_v1"
    own = (
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        "{% else %}{{ p['text'] }}</s>{% endif %}{% endfor %}{% endfor %}"
    )
    picture = Image.new("RGB", (56, 56))
    for name, text in (
        ("chat_template.json", json.dumps({"chat_template": own})),
        ("chat_template.jinja", own),
    ):
        (tmp_path / name).write_text(text)
        coder = load_assembled(tmp_path).encoder
        sample = coder.encode_prompt([Turn("user", (0, "What?"))], [picture])
        assert int((sample.input_ids == 259).sum()) == 4
        assert coder.tokenizer.decode(sample.input_ids[-6:]).endswith("What?</s>")
        (tmp_path / name).unlink()


CONVERSATION = [
    Turn("user", (0, "\nWhat?")),
    Turn("assistant", ('A "dog".',)),
    Turn("user", ("Sure?",)),
]


def as_messages(turns: list[Turn]) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.speaker,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]


def rendered(template: str, turns: list[Turn], tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        as_messages(turns), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return text


def joined(coder: Encoder, turns: list[Turn]) -> str:
    segments = coder.template.segments(turns, coder.system, add_generation_prompt=True)
    return "".join("<image>" if s.image is not None else s.text for s in segments)


PIECES = [name for name in TEMPLATES if type(TEMPLATES.get(name)) is PieceTemplate]


class _Bare:
    """An encoder as far as templates go; most markers are no tokens of the tiny tokenizer."""

    def __init__(self, template: Any, system: str | None) -> None:
        self.template, self.system = template, system


@pytest.mark.parametrize("system", [None, 'Be "brief".\n', ""])
@pytest.mark.parametrize("name", PIECES)
def test_named_templates_as_jinja(shelf: Path, name: str, system: str | None) -> None:
    _, facts = composed(shelf)
    coder: Any = _Bare(TEMPLATES.get(name), system)
    turns = CONVERSATION[:1] if name == "plain" else CONVERSATION
    template = chat_template(coder)
    assert rendered(template, turns, facts.tokenizer) == joined(coder, turns)
    own = [Turn("system", ("Mine.",)), *turns]
    assert rendered(template, own, facts.tokenizer) == joined(coder, own)


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in PIECES])
def test_templates_without_a_jinja_form(name: str) -> None:
    assert len(PIECES) >= 9
    coder: Any = _Bare(TEMPLATES.get(name), None)
    with pytest.raises(TemplateError, match="--to vistune"):
        chat_template(coder)


def test_tokenizer_template_as_jinja(shelf: Path) -> None:
    _, facts = composed(shelf)
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = JinjaTemplate(
        name="t", source=source, variables={"bos_token": "<s>"}, special_tokens=("</s>",)
    )
    coder: Any = _Bare(template, "Sys.")
    assert rendered(chat_template(coder), CONVERSATION, facts.tokenizer) == joined(
        coder, CONVERSATION
    )


def test_template_text_is_never_read_as_jinja(shelf: Path) -> None:
    template = PieceTemplate(name="t", user_open="{{ not jinja }} {%", user_close="\\n'\"")
    coder: Any = _Bare(template, None)
    _, facts = composed(shelf)
    turns = CONVERSATION[:1]
    assert rendered(chat_template(coder), turns, facts.tokenizer) == joined(coder, turns)


def test_directory_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_directory(target, overwrite=False) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_directory(target, overwrite=False) as folder:
        (folder / "a").write_text("1")
    with (
        pytest.raises(CheckpointError, match="something here"),
        new_directory(target, overwrite=False),
    ):
        pass
    with new_directory(target, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
