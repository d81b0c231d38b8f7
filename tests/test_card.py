"""The model card: what the hub reads of it, and what people do."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from lorabooth import consent
from lorabooth.card import NOTICE, model_card
from lorabooth.hub import public_recipe
from lorabooth.licences import LICENCES
from lorabooth.runs import RunDir

SAMPLES = ("samples/0.png",)


def changed(run: RunDir, **changes: Any) -> RunDir:
    """The run, as if it had been trained with other settings."""
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(config | changes))
    return run


def matter(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_hub_reads_what_it_is_and_of_what(run: RunDir):
    card = model_card(changed(run, model="black-forest-labs/FLUX.1-dev"), "me/tok", SAMPLES)
    assert matter(card) == {
        "license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": LICENCES["dev"].url,
        "base_model": "black-forest-labs/FLUX.1-dev", "base_model_relation": "adapter", "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "instance_prompt": "TOK", "tags": ["text-to-image", "diffusers", "lora", "flux", "lorabooth", "template:diffusion-lora"],
        "widget": [{"text": "a portrait of TOK", "output": {"url": "samples/0.png"}}],
    }  # fmt: skip
    assert ModelCard(card).data.to_dict() == matter(card), "huggingface_hub reads another card than we wrote"
    assert NOTICE in card and "derivative" in card and "to filter or review pictures" in card


@pytest.mark.parametrize(
    ("model", "licence", "words", "not_in"),
    [
        ("black-forest-labs/FLUX.1-dev", "other", ["load_lora_weights", "ComfyUI", "replicate.run", "lorabooth generate"], []),
        ("black-forest-labs/FLUX.1-schnell", "apache-2.0", ["load_lora_weights", "lorabooth generate"], ["replicate.run", NOTICE]),
        ("somebody/flux-finetune", "other", ["load_lora_weights", NOTICE], ["replicate.run"]),
        ("mini", "apache-2.0", ["lorabooth generate"], ["load_lora_weights", "ComfyUI", "base_model", NOTICE]),
    ],
)
def test_it_says_how_to_use_it_with_what_can(model: str, licence: str, words: list[str], not_in: list[str], run: RunDir):
    card = model_card(changed(run, model=model), "me/tok")
    assert matter(card)["license"] == licence and "me/tok" in card
    assert all(word in card for word in words) and not any(word in card for word in [*not_in, "<Gallery", "widget", "Likeness"])
    assert not re.search(r"\n\n\n|\{[{%]|None", card)


def test_a_folder_of_this_machine_does_not_travel(run: RunDir, tmp_path: Path):
    (tmp_path / "secret" / "my-flux").mkdir(parents=True)
    card = model_card(changed(run, model=str(tmp_path / "secret" / "my-flux")), "me/tok")
    assert "secret" not in card and "a LoRA of my-flux" in card and "base_model" not in matter(card)


def test_words_of_any_kind_stay_valid(run: RunDir):
    trigger = 'T"O: #K, `é`'
    card = model_card(changed(run, trigger_word=trigger, preview_prompts=['[trigger] says: "hi" | {{ x }}\n---\n'], targets="a|b"), "me/tok", SAMPLES)
    assert matter(card)["instance_prompt"] == trigger and matter(card)["widget"][0]["text"] == f'{trigger} says: "hi" | {{{{ x }}}} ---'
    assert ModelCard(card).data.instance_prompt == trigger and "a\\|b" in card


def test_it_tells_what_learnt_at_which_rate(run: RunDir):
    plain, card = model_card(run, "me/tok"), model_card(changed(run, train_text_encoder=True, text_encoder_lr_ratio=0.25, loraplus_lr_ratio=4.0), "me/tok")
    assert "CLIP" not in plain and "and CLIP |" in card
    assert "| 0.02, adamw, of lora_B 4 times that, of CLIP 0.25 times that |" in card
    one_rate = model_card(changed(run, optimizer="prodigy", loraplus_lr_ratio=1.0), "me/tok")
    assert "| 0.02, prodigy |" in one_rate and "and CLIP |" in one_rate, "prodigy has one rate for both parts"


def test_consent_and_likeness_stand_in_it_where_they_were_given(run: RunDir):
    assert "agreed" not in model_card(run, "me/tok")
    agreed = consent.Consent(consent.STATEMENT, "2026-01-02T03:04:05Z", "option")
    run.write_json("consent.json", dataclasses.asdict(agreed))
    run.write_json("likeness.json", {"by": "a drawing", "scores": {"identity right": 0.987}})
    card = model_card(run, "me/tok")
    assert agreed.sentence() in card and "## Likeness" in card and "| identity right | 0.99 |" in card


def test_a_recipe_that_travels_has_no_path_and_no_account(run: RunDir, tmp_path: Path):
    (tmp_path / "secret" / "my-llava").mkdir(parents=True)
    config = changed(run, caption_model=str(tmp_path / "secret" / "my-llava"), wandb_entity="me-secret", wandb_run="secret").config
    told = json.dumps(public_recipe(config))
    assert "secret" not in told and '"caption_model": "my-llava"' in told
    (tmp_path / "secret" / "my-llava").rmdir()
    assert "secret" not in json.dumps(public_recipe(config))
