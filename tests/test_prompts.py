"""Where prompts come from: an argument, a file, templates; and what becomes of them in the files of `lorabooth generate`."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from infer import templates
from infer.loras import LoraChoice
from infer.picture import making_of
from infer.prompts import PromptOptions, Prompts
from infer.request import PROMPT_CHARACTERS_LIMIT, Request
from infer.trigger import Trigger
from infer.wildcards import has_wildcards
from lorabooth.cli import main
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.lora_file import LoraFile
from lorabooth.mini import world

SMALL = ("--steps", "1", "--width", "64", "--height", "64", "--seed", "7")
FAST = ("--model", "mini", *SMALL)
REQUEST = Request("x", 64, 64, 7)
MAN = LoraChoice(
    LoraFile(Path("m.safetensors"), {"modelspec.trigger_phrase": "TOK", "lorabooth.recipe": '{"subject": "person", "class_phrase": "a man"}'}, {}), 1.0
)
INK = LoraChoice(LoraFile(Path("i.safetensors"), {"modelspec.trigger_phrase": "INK", "lorabooth.recipe": '{"subject": "style"}'}, {}), 1.0)


def drawn(out: Path) -> list[str]:
    """The prompts in the pictures of a folder, in order."""
    return [making_of(file)["prompt"] for file in sorted(out.glob("out-*.webp"), key=lambda file: int(file.stem[4:]))]


def problem(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What was said of a mistake, before any work."""
    assert main(["generate", *arguments, *FAST, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lorabooth") and len(said.splitlines()) <= 2 and not out.exists()
    return said


# Wildcards


def test_each_picture_keeps_the_prompt_its_seed_chose(tmp_path: Path):
    prompt = "a person in a {red|blue|white|black} {hoodie|tuxedo}"
    assert main(["generate", prompt, *FAST, "-n", "4", "--out", str(tmp_path / "a")]) == 0
    prompts = drawn(tmp_path / "a")
    assert len(set(prompts)) > 1 and not any(character in "".join(prompts) for character in "{|}")
    assert main(["generate", prompt, *FAST[:-1], "9", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "out-0.webp").read_bytes() == (tmp_path / "a" / "out-2.webp").read_bytes()
    assert main(["generate", prompts[2], *FAST[:-1], "9", "--out", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c" / "out-0.webp").read_bytes() == (tmp_path / "a" / "out-2.webp").read_bytes()


def test_wildcard_files_and_mistakes_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "colour.txt").write_text("green\n")
    cards = ["--wildcards", str(tmp_path / "cards")]
    assert main(["generate", "a __colour__ hat", *cards, *FAST, "--out", str(tmp_path / "a")]) == 0
    assert drawn(tmp_path / "a") == ["a green hat"]
    capsys.readouterr()
    for prompt, words in (("a __color__ hat", "there are: __colour__"), ("a __../x__ hat", "letters"), ("a {b", "character 3 of the prompt")):
        assert words in problem([prompt, *cards], tmp_path / "none", capsys)


# Files


def test_a_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa café\r\n\r\n# a remark\r\n  a {hat|hat}  \r\n".encode())
    assert main(["generate", "--prompts", str(file), *FAST, "-n", "2", "--out", str(tmp_path / "a"), "--json"]) == 0
    captured = capsys.readouterr()
    assert drawn(tmp_path / "a") == ["a café", "a café", "a hat", "a hat"]
    assert [Path(entry["file"]).name for entry in json.loads(captured.out)] == ["out-0.webp", "out-1.webp", "out-2.webp", "out-3.webp", "contact-sheet.png"]
    assert "4/4" in captured.err, "one bar for all"


def test_files_that_are_no_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "prompts.txt"
    for content, words in ((b"# a\n\n", "no line"), (b"\xff\xfea", "UTF-8"), (b"a\n" * 201, "201 lines; the limit is 200"), (b"a" * 5_000_000, "4 MiB")):
        file.write_bytes(content)
        assert words in problem(["--prompts", str(file)], tmp_path / "out", capsys)
    file.write_bytes(b"a\n# a remark\na {b\n")
    assert f"{file}, line 3: character 3 of the prompt" in problem(["--prompts", str(file)], tmp_path / "out", capsys)
    assert "no file" in problem(["--prompts", str(tmp_path / "none")], tmp_path / "out", capsys)
    file.write_bytes(b"a\n" * 200)
    assert "make 600; the limit is 400" in problem(["--prompts", str(file), "-n", "3"], tmp_path / "out", capsys)


def test_one_source_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "a prompt is missing" in problem([], tmp_path / "out", capsys)
    assert "PROMPT and --template are both given" in problem(["a", "--template", "chef"], tmp_path / "out", capsys)
    assert "do not go together" in problem(["--as-written", "--template", "chef"], tmp_path / "out", capsys)


# Templates


def test_templates_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "--list-templates"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S.*TOK", printed, re.M) for name in (*templates.FLUX, *templates.MINI)) and "[who]" not in printed


def test_templates_are_prompts():
    assert len(templates.FLUX) >= 20
    for text in (*templates.FLUX.values(), *templates.MINI.values()):
        assert text.count("[who]") == 1 and not has_wildcards(text) and len(text) < PROMPT_CHARACTERS_LIMIT
    assert set(templates.MINI) <= set(templates.FLUX)


def test_the_words_of_the_mini_templates_are_those_of_its_world():
    known = {word for a in world.SCENE for v in world.values(a) for word in re.findall(r"[\w'-]+", world.phrase(a, v))} | set(
        ["a", "in", "on", "background", "portrait", "of"]
    )
    family = load_family("mini")
    for text in templates.MINI.values():
        assert set(re.findall(r"[\w'-]+", text.replace("[who]", ""))) <= known, text
        assert family.sees_all_of(text.replace("[who]", "TOK"))


def test_who_stands_in_a_template():
    def first(*choices: LoraChoice) -> str:
        prompts = Prompts.read((), PromptOptions(templates=("chef",)), choices, mini=False)
        return prompts.requests(REQUEST)[0].prompt

    assert first(MAN).startswith("A photo of TOK, a man as a chef,")
    assert first().startswith("A photo of a person as a chef,")
    assert first(INK, MAN).startswith("a picture in the style of INK, showing A photo of TOK, a man as a chef,")


def test_templates_by_name_and_all(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "--template", "chef", "--template", "street", "--lora", str(tiny_run), *SMALL, "--out", str(tmp_path / "a")]) == 0
    assert drawn(tmp_path / "a") == [templates.MINI[name].replace("[who]", "TOK") for name in ("chef", "street")]
    assert "note:" not in capsys.readouterr().err
    assert main(["generate", "--template", "all", *FAST, "--out", str(tmp_path / "b")]) == 0
    assert len(drawn(tmp_path / "b")) == len(templates.MINI)
    capsys.readouterr()
    said = problem(["--template", "chief"], tmp_path / "out", capsys)
    assert "did you mean chef?" in said and "all for all of them" in said


# The trigger word


def test_the_trigger_word_is_put_in_and_said(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["generate", "a portrait of TOKYO", *SMALL, "--lora", str(tiny_run)]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert "note: put the trigger word TOK into the prompt: TOK, a portrait of TOKYO" in capsys.readouterr().err
    assert drawn(tmp_path / "a") == ["TOK, a portrait of TOKYO"]
    assert main([*arguments, "--as-written", "--out", str(tmp_path / "b")]) == 0
    assert "note: the prompt lacks 'TOK'" in capsys.readouterr().err
    assert drawn(tmp_path / "b") == ["a portrait of TOKYO"]
    for prompt in ("TOK, smiling", "[trigger], smiling"):
        assert main(["generate", prompt, *SMALL, "--lora", str(tiny_run), "--out", str(tmp_path / "c")]) == 0
        assert "note:" not in capsys.readouterr().err
    assert drawn(tmp_path / "c") == ["TOK, smiling"] * 2


def test_as_written_is_to_the_letter(tmp_path: Path):
    prompt = 'a {"json|like": "prompt"'
    assert main(["generate", prompt, *FAST, "--as-written", "--out", str(tmp_path)]) == 0
    assert drawn(tmp_path) == [prompt]


def test_a_trigger_of_many_prompts_is_one_note():
    prompts = Prompts.read(("a man", "a hat", "TOK"), PromptOptions(), (MAN,), mini=False)
    assert [request.prompt for request in prompts.requests(REQUEST)] == ["TOK, a man", "TOK, a man, a hat", "TOK"]
    assert prompts.notes() == ["put the trigger word TOK into 2 prompts (--as-written leaves prompts alone)"]
    assert prompts.triggers == (Trigger("TOK", "person", "a man"),)


def test_a_sheet_of_many_pictures_is_small(tmp_path: Path):
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"hat {i}" for i in range(17)))
    assert main(["generate", "--prompts", str(file), "--model", "mini", "--steps", "1", "--width", "352", "--height", "64", "--out", str(tmp_path / "a")]) == 0
    with Image.open(tmp_path / "a" / "contact-sheet.png") as sheet:
        assert sheet.width == 4 * 320


def test_a_placeholder_needs_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "[trigger] in a prompt needs a LoRA" in problem(["a [trigger]"], tmp_path / "out", capsys)
    with pytest.raises(UserError):
        Prompts.read((), PromptOptions(), (), mini=False)
