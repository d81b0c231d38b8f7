"""What a LoRA reference may say, and that no text whatever brings the parser down."""

import contextlib
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer.references import PICKLES, CivitaiReference, HubReference, UrlReference, parse, safe, split_weight
from lorabooth.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("owner/name", HubReference("owner/name")),
        ("owner/name@v1.0", HubReference("owner/name", "", "v1.0")),
        ("owner/name@refs/pr/3", HubReference("owner/name", "", "refs/pr/3")),
        ("owner/name/lora.safetensors", HubReference("owner/name", "lora.safetensors")),
        (f"owner/name/a b/lora.safetensors@{COMMIT}", HubReference("owner/name", "a b/lora.safetensors", COMMIT)),
        (f"{HUB}/owner/name", HubReference("owner/name")),
        (f"{HUB}/owner/name/", HubReference("owner/name")),
        ("https://hf.co/owner/name?not-for-all-audiences=true#readme", HubReference("owner/name")),
        ("HTTPS://HuggingFace.co/Owner/Name", HubReference("Owner/Name")),
        (f"{HUB}/owner/name/tree/main", HubReference("owner/name")),
        (f"{HUB}/owner/name/tree/v2/checkpoint-500", HubReference("owner/name", "", "v2", "checkpoint-500")),
        (f"{HUB}/owner/name/tree/refs%2Fpr%2F3", HubReference("owner/name", "", "refs/pr/3")),
        (f"{HUB}/owner/name/blob/main/lora.safetensors", HubReference("owner/name", "lora.safetensors")),
        (f"{HUB}/owner/name/resolve/{COMMIT}/a%20b/lora.safetensors?download=true", HubReference("owner/name", "a b/lora.safetensors", COMMIT)),
        (f"{HUB}/owner/name/resolve/refs%2Fpr%2F3/lora.safetensors", HubReference("owner/name", "lora.safetensors", "refs/pr/3")),
        (f"{HUB}/owner/name/resolve/refs/pr/3/lora.safetensors", HubReference("owner/name", "lora.safetensors", "refs/pr/3")),
        (f"{HUB}/owner/name/discussions", HubReference("owner/name")),
        ("https://civitai.com/models/12", CivitaiReference("civitai.com", 12)),
        ("https://www.civitai.com/models/12/some-name", CivitaiReference("civitai.com", 12)),
        ("https://civitai.red/models/12?modelVersionId=34", CivitaiReference("civitai.red", 12, 34)),
        ("https://civitai.green/models/12/x?modelVersionId=34&y=1", CivitaiReference("civitai.green", 12, 34)),
        ("https://civitai.com/de/models/12", CivitaiReference("civitai.com", 12)),
        ("https://civitai.com/api/v1/models/12", CivitaiReference("civitai.com", 12)),
        ("https://civitai.com/api/v1/model-versions/34", CivitaiReference("civitai.com", None, 34)),
        ("https://civitai.com/api/download/models/34", CivitaiReference("civitai.com", None, 34)),
        (
            "https://civitai.com/api/download/models/34?type=Model&format=SafeTensor&token=s3cret",
            CivitaiReference("civitai.com", None, 34, "type=Model&format=SafeTensor", "s3cret"),
        ),
        ("https://a.example/x.safetensors", UrlReference("https://a.example/x.safetensors")),
        ("https://a.example:8443/x.safetensors?sig=1#part", UrlReference("https://a.example:8443/x.safetensors?sig=1")),
        ("https://replicate.delivery/x/trained_model.tar", UrlReference("https://replicate.delivery/x/trained_model.tar")),
        ("https://a.example/download/77", UrlReference("https://a.example/download/77")),
        ("https://huggingface.co.evil.example/owner/name", UrlReference("https://huggingface.co.evil.example/owner/name")),
        ("https://evil-civitai.com/models/1", UrlReference("https://evil-civitai.com/models/1")),
    ],
)
def test_each_kind_of_reference_is_told(name: str, reference: object):
    assert parse(name) == reference
    assert [parse(part) for part in split_weight(f"{name}:0.8")[:1]] == [reference]
    assert split_weight(f"{name}:0.8") == (name, 0.8) and split_weight(name) == (name, 1.0)


@pytest.mark.parametrize(
    ("reference", "name", "weight"),
    [
        ("https://a.example:8443/x.safetensors", "https://a.example:8443/x.safetensors", 1.0),
        ("https://a.example:8443", "https://a.example:8443", 1.0),
        ("https://a.example:2", "https://a.example:2", 1.0),
        ("https://[2606::1]:2", "https://[2606::1]:2", 1.0),
        ("https://a.example:8443/x.safetensors:0.8", "https://a.example:8443/x.safetensors", 0.8),
        ("https://a.example/x.safetensors?v=1:2", "https://a.example/x.safetensors?v=1", 2.0),
        ("owner/name:1.", "owner/name", 1.0),
        ("owner/name:+.5", "owner/name", 0.5),
        ("owner/name:-2", "owner/name", -2.0),
        ("owner/name:x", "owner/name:x", 1.0),
        ("owner/name:", "owner/name:", 1.0),
        ("owner/name:nan", "owner/name:nan", 1.0),
        ("owner/name:1e9", "owner/name:1e9", 1.0),
        ("owner/name:\u0661", "owner/name:\u0661", 1.0),
        (":1", ":1", 1.0),
    ],
)
def test_a_weight_is_a_number_behind_the_last_colon_but_no_port(reference: str, name: str, weight: float):
    assert split_weight(reference) == (name, weight)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "the name of a LoRA is empty"),
        (" ", "the name of a LoRA is empty"),
        ("owner", "no LoRA at"),
        ("a/b/c.pt", "a .pt file, a pickle"),
        ("owner/name/x.txt", "is not a .safetensors file"),
        ("owner/name/../../x.safetensors", "no LoRA at"),
        ("owner/name@../x", "no LoRA at"),
        ("owner/name@", "no LoRA at"),
        ("owner/näme", "no LoRA at"),
        ("~nobody-here/x", "no LoRA at"),
        ("x\0y", "no LoRA at"),
        ("x" * 5000, "no LoRA at"),
        (f"{HUB}/datasets/owner/name", "is not the page of a model"),
        (f"{HUB}/spaces/owner/name", "is not the page of a model"),
        (f"{HUB}/owner", "is not the page of a model"),
        (f"{HUB}/", "is not the page of a model"),
        (f"{HUB}/owner/name/blob/main/README.md", "is not a .safetensors file"),
        (f"{HUB}/owner/name/resolve/main/x.bin", "a .bin file, a pickle"),
        (f"{HUB}/owner/name/resolve/main/%2e%2e/x.safetensors", "no LoRA at"),
        (f"{HUB}/a%2Fb/name", "is not the page of a model"),
        ("https://civitai.com/", "is not the page of a model"),
        ("https://civitai.com/images/12", "is not the page of a model"),
        ("https://civitai.com/models/x12", "is not the page of a model"),
        ("https://civitai.com/models/12?modelVersionId=newest", "names a version 'newest'"),
        ("https://a.example/x.ckpt", "a .ckpt file, a pickle"),
        ("https://a.example/x.PT?sig=1", "a .pt file, a pickle"),
        ("ftp://a.example/x.safetensors", "is not an address of the web"),
        ("file:///etc/passwd", "is not an address of the web"),
        ("https://", "is not an address of the web"),
        ("https://user:pw@a.example/x.safetensors", "holds a user name"),
    ],
)
def test_what_names_no_lora_is_one_sentence(name: str, words: str):
    with pytest.raises(UserError) as caught:
        parse(name)
    assert words in caught.value.message and "\n" not in caught.value.message and "pw" not in str(caught.value)


@pytest.mark.parametrize("ending", PICKLES)
@pytest.mark.parametrize("place", ["https://a.example/x{}", "owner/name/x{}", HUB + "/owner/name/blob/main/x{}"])
def test_no_pickle_is_asked_for(ending: str, place: str):
    with pytest.raises(UserError, match="to read it is to run the code in it"):
        parse(place.format(ending))


def test_a_file_of_this_machine_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name:2").mkdir()
    assert parse("owner/name") == Path("owner/name")
    assert split_weight("owner/name:2") == ("owner/name:2", 1.0)
    assert parse("owner/name@main") == HubReference("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("~/owner/name") == tmp_path / "owner/name"


def test_a_message_shows_no_secret_of_an_address():
    assert safe("https://user:pw@a.example/x.safetensors?sig=s3cret#x") == "https://a.example/x.safetensors"
    assert "s3cret" not in repr(parse("https://a.example/x?sig=s3cret")) + repr(parse("https://civitai.com/api/download/models/1?token=s3cret"))


NAME = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=20)
WEIGHT = st.floats(-2, 3).map(lambda x: f"{x:.4f}")
PLACES = st.one_of(
    st.builds(lambda a, b: f"no-such-{a}/{b}", NAME, NAME),
    st.builds(lambda a, b: f"{HUB}/{a}-x/{b}", NAME, NAME),
    st.builds(lambda n: f"https://civitai.com/models/{n}", st.integers(1, 10**9)),
    st.builds(lambda host, port, file: f"https://x{host}.example:{port}/{file}.safetensors", st.text(string.ascii_lowercase), st.integers(1, 65535), NAME),
)


@given(PLACES, WEIGHT)
def test_a_weight_can_stand_behind_every_place(place: str, weight: str):
    assert split_weight(place) == (place, 1.0)
    assert split_weight(f"{place}:{weight}") == (place, float(weight))
    assert parse(split_weight(f"{place}:{weight}")[0]) == parse(place)


@given(st.one_of(st.text(max_size=60), st.text("ab/:.@~%?#[]&=0 1\\-", max_size=30), st.text("ab/:.@%?#[]&=01\\-", max_size=40).map(lambda t: f"https://{t}")))
def test_any_text_is_a_reference_or_a_user_error(text: str):
    try:
        name, weight = split_weight(text)
        assert -2 <= weight <= 3 and text.startswith(name)
        found = parse(name)
    except UserError as error:
        assert error.message
        return
    assert isinstance(found, Path | HubReference | CivitaiReference | UrlReference)
    if isinstance(found, HubReference):
        assert ".." not in found.file.split("/") and not found.repository.startswith(("/", "."))


@given(st.sampled_from(["/", "/owner/name/", "/models/"]), st.text(max_size=40))
def test_any_address_of_the_hub_or_civitai_is_a_reference_or_a_user_error(start: str, rest: str):
    for host in ("huggingface.co", "civitai.com"):
        with contextlib.suppress(UserError):
            assert isinstance(parse(f"https://{host}{start}{rest}"), HubReference | CivitaiReference)
