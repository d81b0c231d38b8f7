"""The recipe: defaults, and one sentence for each way to get it wrong."""

import math
from pathlib import Path
from typing import Any

import click
import pytest

from lorabooth.config import TrainConfig, load_config
from lorabooth.errors import UserError
from train.command import recipe_config, train

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def refusal(recipe: Path | None = None, **values: Any) -> str:
    """The sentence that refuses these settings; a trigger is given unless the values name one."""
    with pytest.raises(UserError) as caught:
        load_config(recipe, {"trigger_word": "TOK"} | values)
    message = caught.value.message
    assert len(message.splitlines()) == 1, f"more than one line: {message!r}"
    return message


def yaml_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_trigger_alone_gives_the_recipe_for_flux_dev():
    config = load_config(None, {"trigger_word": "TOK"})
    assert (config.model, config.steps, config.lora_rank, config.alpha, config.batch_size) == ("black-forest-labs/FLUX.1-dev", 1000, 16, 16, 1)
    assert config.resolutions_px == (512, 768, 1024)
    assert config.targets == "attention+ff"


def test_values_of_none_leave_the_recipe_or_the_default_and_others_win(tmp_path: Path):
    recipe = yaml_file(tmp_path, "trigger_word: ABC\nsteps: 7\nlora_rank: 4\n")
    config = load_config(recipe, {"trigger_word": None, "steps": 9, "lora_rank": None, "seed": None})
    assert (config.trigger_word, config.steps, config.lora_rank, config.seed) == ("ABC", 9, 4, 42)


def test_alpha_is_the_rank_unless_it_is_set():
    assert load_config(None, {"trigger_word": "TOK", "lora_rank": 8}).alpha == 8
    assert load_config(None, {"trigger_word": "TOK", "lora_rank": 8, "lora_alpha": 2}).alpha == 2


def test_a_config_never_changes_and_survives_json():
    config = load_config(None, {"trigger_word": "Zoë", "preview_prompts": ["[trigger] as a chef", "[trigger]"], "learning_rate": 1 / 3})
    with pytest.raises(ValueError):
        config.steps = 3  # type: ignore[misc]
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert TrainConfig(**config.recipe()) == config


def test_an_unknown_setting_names_the_nearest_or_all():
    assert refusal(learning_rat=1e-4) == "unknown setting 'learning_rat'; did you mean 'learning_rate'?"
    message = refusal(qqq=1)
    assert "'qqq'" in message and all(name in message for name in TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 100_001),
        ("steps", 1.5),
        ("steps", "many"),
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", 2),
        ("learning_rate", math.nan),
        ("warmup_steps", -1),
        ("batch_size", 0),
        ("batch_size", 65),
        ("lora_rank", 0),
        ("lora_rank", 257),
        ("lora_alpha", 0),
        ("caption_dropout_rate", -0.1),
        ("caption_dropout_rate", 1.1),
        ("ema_decay", 1),
        ("ema_decay", -0.5),
        ("max_grad_norm", 0),
        ("max_grad_norm", math.inf),
        ("weight_decay", -1),
        ("weight_decay", math.inf),
        ("gradient_checkpointing", "perhaps"),
        ("seed", -1),
        ("seed", 2**64),
        ("checkpoint_every", 0),
        ("preview_every", -1),
        ("preview_seed", -1),
        ("preview_seed", 2**64),
        ("preview_prompts", 3),
        ("trigger_word", "x" * 101),
        ("trigger_word", 12),
    ],
)
def test_a_value_out_of_range_is_one_sentence_with_its_name_and_value(name: str, value: Any):
    message = refusal(**{name: value})
    assert message.startswith(f"{name}: ") and repr(value) in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True, "lora_init": "pissa"}, "both rewrite what a LoRA starts from"),
        ({"blocks_to_swap": 4, "gradient_checkpointing": "none"}, "gradient_checkpointing auto or all"),
        ({"train_text_encoder": True, "precompute_modulation": True}, "the pooled prompts ahead"),
        ({"optimizer": "prodigy", "loraplus_lr_ratio": 4}, "prodigy finds one for all"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_together(settings: dict[str, Any], words: str):
    assert words in refusal(**settings)


# U+0085 and U+2028 end a line too, and U+202E would turn a terminal's text around.
@pytest.mark.parametrize("trigger", ["", " ", "\t", "TOK\n", "a\nb", "a\x00b", "a\x7fb", "a\x1b[31mb", "a\x85b", "a\u2028b", "a\u202eb", "a\udcffb"])
def test_a_trigger_is_visible_text_on_one_line(trigger: str):
    message = refusal(trigger_word=trigger)
    assert message.startswith("trigger_word: ") and message.isprintable()


def test_a_trigger_may_have_any_script_and_loses_the_spaces_around_it():
    for trigger in ("TOK", "ohwx person", "Zoë", "小林", "O'Neil"):
        assert load_config(None, {"trigger_word": f" {trigger}  "}).trigger_word == trigger


def test_an_example_in_a_refusal_keeps_its_capitals():
    assert "such as TOK" in refusal(trigger_word="a\nb")


def test_a_missing_trigger_says_how_to_give_one():
    with pytest.raises(UserError) as caught:
        load_config(None, {})
    assert "--trigger-word TOK" in caught.value.message


@pytest.mark.parametrize("resolution", ["", "32", "63", "2049", "512;768", "512,", "512,big", "512.0", "-512", "²", "1e3"])
def test_a_resolution_is_side_lengths_from_64_to_2048(resolution: str):
    message = refusal(resolution=resolution)
    assert "64 to 2048" in message and repr(resolution) in message


def test_resolutions_may_have_spaces_and_come_back_as_numbers():
    assert load_config(None, {"trigger_word": "TOK", "resolution": " 64, 2048 "}).resolutions_px == (64, 2048)


def test_a_resolution_in_yaml_needs_no_quotes(tmp_path: Path):
    recipe = yaml_file(tmp_path, "resolution: 512\n")
    assert load_config(recipe, {"trigger_word": "TOK"}).resolutions_px == (512,)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_complete_but_for_the_trigger(recipe: Path):
    assert load_config(recipe, {"trigger_word": "TOK"}).trigger_word == "TOK"


@pytest.mark.parametrize("line", ["steps: yes", "learning_rate: on", "lora_alpha: true", "seed: off"])
def test_yes_and_no_are_no_numbers(tmp_path: Path, line: str):
    assert "must be a number" in refusal(yaml_file(tmp_path, line + "\n"))
    assert load_config(yaml_file(tmp_path, "horizontal_flip: yes\n"), {"trigger_word": "TOK"}).horizontal_flip


def test_there_are_shipped_recipes():
    assert {path.name for path in RECIPES} >= {"mini.yaml", "person.yaml"}


@pytest.mark.parametrize(
    "content",
    [
        "steps: [\n", "- steps\n", "just words\n", "", "\tsteps: 3\n", b"\xff\xfe\x00", b"steps: \x00\n", "1: 2\n", "true: 3\n", "a: " + "[" * 5000,
        "steps: 2020-13-45\n", "steps: !!timestamp 2020-13-99\n", "steps: !!int abc\n", "x: !!timestamp q\n", "steps: " + "9" * 5000, "steps: 0x" + "f" * 9000,
        "steps: &a [1]\nseed: *a\n", "steps: 3\nsteps: 4\n", "steps: 1:30\n", "#" * (1 << 20), '"\\ud800": 1\n', 'trigger_word: "\\ud800"\n',
    ],
    ids=[
        "open bracket", "list", "words", "empty", "tab", "not UTF-8", "NUL", "number as name", "truth as name", "deep", "no date", "no timestamp", "no number",
        "no timestamp either", "long number", "long hexadecimal", "alias", "twice", "base 60", "too large", "half a character as name", "half a character",
    ],
)  # fmt: skip
def test_a_broken_recipe_file_is_one_sentence(tmp_path: Path, content: str | bytes):
    assert len(refusal(yaml_file(tmp_path, content), **({"trigger_word": None} if "trigger" in str(content) else {}))) < 1000


def test_numbers_in_yaml_are_those_that_people_mean(tmp_path: Path):
    recipe = yaml_file(tmp_path, "resolution: 0512\nlearning_rate: 1e-3\nsteps: 1_000\nlora_alpha: null\nhorizontal_flip: yes\ntrigger_word: 2020-01-01\n")
    config = load_config(recipe, {})
    assert (config.resolutions_px, config.learning_rate, config.steps, config.lora_alpha) == ((512,), 1e-3, 1000, None)
    assert config.horizontal_flip and config.trigger_word == "2020-01-01"


@pytest.mark.parametrize("name", ["trigger_word", "class_phrase", "autocaption_prefix", "wandb_run", "caption_model", "preview_prompts"])
def test_text_that_is_not_utf8_is_one_sentence(name: str):
    assert refusal(**{name: ["\udcff"] if name == "preview_prompts" else "\udcff"}).startswith(f"{name}: must be text in UTF-8")


def test_the_class_phrase_follows_the_subject_where_none_is_given():
    phrases = [load_config(None, {"trigger_word": "TOK", "subject": subject}).class_phrase for subject in ("person", "object", "style")]
    assert phrases == ["a person", "an object", "a person"], "a style stands for no class"
    assert load_config(None, {"trigger_word": "TOK", "subject": "object", "class_phrase": "a dog"}).class_phrase == "a dog"
    assert recipe_config(Path("configs/object.yaml"), {"trigger_word": "TOK"}).class_phrase == "an object"


def test_a_recipe_that_is_missing_or_a_folder_is_named(tmp_path: Path):
    assert "missing.yaml" in refusal(tmp_path / "missing.yaml")
    assert str(tmp_path) in refusal(tmp_path)


def test_every_setting_has_an_option_with_its_sentence():
    options = {parameter.name: parameter for parameter in train.params if isinstance(parameter, click.Option)}
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in options[name].opts
        assert field.description and field.description in (options[name].help or "")
        assert options[name].default is None, "a default here would win over the recipe file"
    assert "--trigger" in options["trigger_word"].opts


def test_an_option_takes_the_type_of_its_setting():
    with train.make_context("train", ["x.zip", "--steps", "3", "--ema-decay", "0.5", "--gradient-checkpointing", "true", "--lora-alpha", "4"]) as context:
        values = {name: context.params[name] for name in ("steps", "ema_decay", "gradient_checkpointing", "lora_alpha")}
    assert values == {"steps": 3, "ema_decay": 0.5, "gradient_checkpointing": "true", "lora_alpha": 4}
