"""A run on its way to the hub, by huggingface_hub's own client against a stand-in: what goes up, what never does, and what happens when it breaks."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from hub_server import GOOD_TOKEN, Repository, client
from push_server import READ_TOKEN, Failure, PushServer
from pushing import FILES, SECRET, copy_with_secrets, pushed, record, started

from lorabooth.card import model_card
from lorabooth.config import load_config
from lorabooth.runs import RunDir


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunDir:
    """A finished run in whose photos, captions and path stand secrets."""
    return copy_with_secrets(tiny_run, tmp_path)


def test_one_commit_has_the_lora_its_card_its_recipe_and_samples_and_no_photo_or_caption(hub: PushServer, run: RunDir, tmp_path: Path):
    done = pushed(hub, str(run.path), "me/tok", "--private", "--json")
    assert done.returncode == 0, done.stderr
    content = hub.content("me/tok")
    assert sorted(content) == FILES and hub.private == {"me/tok": True}
    assert hub.commits == [("me/tok", [name for name in FILES if name != ".gitattributes"])]
    assert content["lora.safetensors"] == run.lora.read_bytes()
    assert content["README.md"].decode() == model_card(run, "me/tok", ["samples/0.png"])
    (tmp_path / "config.yaml").write_bytes(content["config.yaml"])
    assert load_config(tmp_path / "config.yaml", {}).recipe() == run.config.recipe()
    assert b"trainedAlgorithmicMedia" in content["samples/0.png"]
    photos = [photo.read_bytes() for photo in run.photos.iterdir()]
    for sent in [*hub.seen, *content.values()]:
        assert SECRET.encode() not in sent and not any(photo[64:256] in sent for photo in photos)
    assert record(run) == json.loads(done.stdout) | {"repository": "me/tok", "private": True, "problem": "", "begun": True}
    assert record(run)["url"] == f"{hub.endpoint}/me/tok/commit/{hub.repositories['me/tok'].commit}"
    file = client(
        hub, tmp_path / "other", "import json; from huggingface_hub import hf_hub_download; print(json.dumps(hf_hub_download('me/tok', 'lora.safetensors')))"
    )
    assert Path(file).read_bytes() == run.lora.read_bytes()


def test_the_same_again_makes_no_commit_and_a_changed_run_one_without_what_is_there(hub: PushServer, run: RunDir):
    assert pushed(hub, str(run.path), "me/tok").returncode == 0
    assert pushed(hub, str(run.path)).returncode == 0
    assert len(hub.commits) == 1 and len(hub.uploads) == 1
    run.write_json("likeness.json", {"by": "a drawing", "scores": {"identity right": 1.0}})
    assert pushed(hub, str(run.path)).returncode == 0
    assert hub.commits[1] == ("me/tok", ["README.md"]) and len(hub.uploads) == 1


@pytest.mark.parametrize(
    "failure",
    [
        Failure("PUT", "/large/", cut="during"), Failure("POST", "/commit/", cut="before"), Failure("POST", "/commit/", 503), Failure("POST", "/commit/", 429),
        Failure("POST", "/commit/", 409), Failure("POST", "/commit/", cut="after"), Failure("POST", "/preupload/", 500, times=2),
        Failure("PUT", "/large/", 502), Failure("GET", "/api/whoami-v2", 503), Failure("POST", "/repos/create", 429),
        Failure("POST", "/repos/create", cut="before"),
    ],
    ids=lambda failure: f"{failure.method} {failure.path} {failure.status or failure.cut}",
)  # fmt: skip
def test_what_breaks_once_is_tried_again_and_is_one_commit(failure: Failure, hub: PushServer, run: RunDir):
    hub.failures.append(failure)
    done = pushed(hub, str(run.path), "me/tok")
    assert done.returncode == 0, done.stderr
    assert not failure.times and len(hub.commits) == 1 and len(hub.uploads) == 1
    assert sorted(hub.content("me/tok")) == FILES and not record(run)["problem"]


def test_a_push_that_was_killed_goes_on_without_sending_again_what_arrived(hub: PushServer, run: RunDir):
    for number in (signal.SIGKILL, signal.SIGINT):
        hub.failures = [Failure("POST", "/commit/", 503, times=100)]
        process = started(hub, "push", str(run.path), "me/tok")
        while len([call for call in hub.seen if b"/commit/" in call]) == 0:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if number == signal.SIGINT else -9) and "Traceback" not in err
        assert record(run)["problem"] == "it was interrupted" and not hub.commits
        hub.seen.clear()
    hub.failures = []
    assert len(hub.uploads) == 1
    assert pushed(hub, str(run.path)).returncode == 0
    assert len(hub.uploads) == 1 and len(hub.commits) == 1 and sorted(hub.content("me/tok")) == FILES


@pytest.mark.parametrize(
    ("name", "token", "failure", "words"),
    [
        ("me/tok", "hf_wrong", None, "does not know this token"),
        ("me/tok", "", None, "needs a token"),
        ("me/tok", READ_TOKEN, None, "may read only"),
        ("you/tok", GOOD_TOKEN, None, "the token is of me, who cannot write to what belongs to you"),
        ("me", GOOD_TOKEN, None, "is not a name that a repository can have"),
        ("me/a b", GOOD_TOKEN, None, "is not a name that a repository can have"),
        ("me/tok", GOOD_TOKEN, Failure("POST", "/api/repos/create", 403), "may not write to me/tok"),
        ("me/tok", GOOD_TOKEN, Failure("POST", "/commit/", 403), "may not write to me/tok"),
        ("me/tok", GOOD_TOKEN, Failure("POST", "/validate-yaml", 400), "the hub refuses"),
        ("me/tok", GOOD_TOKEN, Failure("POST", "/commit/", 418), "HTTP 418"),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_is_one_sentence(name: str, token: str, failure: Failure | None, words: str, hub: PushServer, run: RunDir):
    hub.failures += [failure] if failure else []
    done = pushed(hub, str(run.path), name, token=token)
    said = [line for line in done.stderr.splitlines() if line.strip() and not re.search(r"\d%\||^note: the LoRA goes to", line)]
    assert done.returncode == 2 and words in said[0] and len(said) <= 2, done.stderr
    assert not hub.commits and not done.stdout
    assert (run.path / "pushed.json").exists() == ("not a name" not in words)


@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_a_damaged_lora_is_not_pushed(damage: str, hub: PushServer, run: RunDir):
    run.lora.write_bytes(run.lora.read_bytes()[:-100] if damage == "cut" else b"junk")
    done = pushed(hub, str(run.path), "me/tok")
    assert done.returncode == 2 and ("cut short" if damage == "cut" else "not a safetensors file") in done.stderr and not hub.commits


def test_damaged_pictures_and_records_are_no_traceback(hub: PushServer, run: RunDir):
    picture = run.samples / "step-000004-0.png"
    data = bytearray(picture.read_bytes())
    data[data.index(b"IDAT") - 6] ^= 64
    picture.write_bytes(data)
    (run.path / "likeness.json").write_text('{"scores": {"face": null}}')
    run.log(event="plan", step=3)
    done = pushed(hub, str(run.path), "me/tok")
    assert done.returncode == 0 and "is damaged, and not pushed" in done.stderr, done.stderr
    (run.path / "pushed.json").write_text('{"repository": 5, "private": false}')
    done = pushed(hub, str(run.path))
    assert done.returncode == 2 and "pushed.json is damaged" in done.stderr
    (run.path / "consent.json").write_text('{"statement": 1, "given": 2, "way": 3}')
    done = pushed(hub, str(run.path), "me/other")
    assert done.returncode == 2 and "is damaged" in done.stderr


@pytest.mark.parametrize("body", ["<html>login</html>", "{}", "[]", "null", ""])
def test_what_is_not_the_hub_is_said(body: str, run: RunDir, tmp_path: Path):
    """A network that wants a login first, or a wrong HF_ENDPOINT."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ours = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_TOKEN": GOOD_TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
        }
        for command in (["push", str(run.path), "me/tok"], ["pull", "me/tok", "--out", str(tmp_path / "x.safetensors")]):
            done = subprocess.run([sys.executable, "-m", "lorabooth", *command], capture_output=True, text=True, env=os.environ | ours)
            assert done.returncode == 2 and "Traceback" not in done.stderr and ("is not the hub" in done.stderr or "no LoRA" in done.stderr), done.stderr
        server.shutdown()


def test_without_network_one_sentence_says_so(hub: PushServer, run: RunDir):
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}):
        done = pushed(hub, str(run.path), "me/tok", **environment)
        assert done.returncode == 2 and ("broke off" in done.stderr or "HF_HUB_OFFLINE" in done.stderr)


def test_what_others_have_made_is_not_written_over(hub: PushServer, run: RunDir):
    theirs = hub.folder / "me" / "tok"
    assert pushed(hub, str(run.path), "me/tok").returncode == 0
    (run.path / "pushed.json").unlink()  # another run, that knows nothing of the first
    (theirs / "lora.safetensors").write_bytes(b"theirs")
    hub.repositories["me/tok"] = Repository(theirs)
    for _ in range(2):
        done = pushed(hub, str(run.path), "me/tok")
        assert done.returncode == 2 and "has files that are not of this run: README.md, config.yaml, lora.safetensors and 1 more" in done.stderr
        assert (theirs / "lora.safetensors").read_bytes() == b"theirs"
    assert pushed(hub, str(run.path), "me/tok", "--force").returncode == 0
    assert (theirs / "lora.safetensors").read_bytes() == run.lora.read_bytes()


def test_a_team_may_be_pushed_to_and_a_run_without_a_lora_may_not(hub: PushServer, run: RunDir):
    assert pushed(hub, str(run.path)).returncode == 2
    assert pushed(hub, str(run.path), "my-team/tok").returncode == 0
    run.lora.unlink()
    done = pushed(hub, str(run.path))
    assert done.returncode == 2 and "its training has not ended" in done.stderr


def test_a_token_is_written_nowhere(hub: PushServer, run: RunDir):
    done = pushed(hub, str(run.path), "me/tok", "--hf-token", GOOD_TOKEN, token="")
    assert done.returncode == 0 and GOOD_TOKEN not in done.stdout + done.stderr
    hub.failures.append(Failure("POST", "/commit/", 403))
    run.write_json("likeness.json", {"by": "a drawing", "scores": {}})
    assert pushed(hub, str(run.path), "--hf-token", "hf_other", token="").returncode == 2
    for file in hub.folder.parent.rglob("*"):
        assert not file.is_file() or GOOD_TOKEN.encode() not in file.read_bytes(), file


# At the end of a training


def trained(hub: PushServer, command: list[str], out: Path, *more: str, token: str = "") -> tuple[int, str, str]:
    process = started(hub, *command, "--out", str(out), *more, token=token)
    printed, said = process.communicate(timeout=300)
    return process.returncode, printed, said


def test_a_training_pushes_at_its_end_and_no_failure_of_that_spoils_it(hub: PushServer, tiny_command: list[str], tmp_path: Path):
    out = tmp_path / "run"
    hub.failures.append(Failure("POST", "/commit/", 403))
    code, printed, said = trained(hub, tiny_command, out, "--hf-repo-id", "me/tok", "--hf-private", "true", "--hf-token", GOOD_TOKEN, "--json")
    assert code == 0 and json.loads(printed)["pushed"] == "", said
    assert f"not pushed to me/tok: this token may not write to me/tok; the LoRA is here, and this goes on with it: lorabooth push {out}" in said
    assert record(RunDir(out))["problem"] and (out / "lora.safetensors").exists() and not hub.commits
    assert pushed(hub, str(out)).returncode == 0 and hub.private["me/tok"]
    assert sorted(hub.content("me/tok")) == FILES
    for file in out.rglob("*"):
        assert not file.is_file() or GOOD_TOKEN.encode() not in file.read_bytes(), file
    # The same run goes on to another name: no other recipe.
    code, printed, said = trained(hub, tiny_command, out, "--hf-repo-id", "me/other", token=GOOD_TOKEN)
    assert code == 0 and f"pushed: {hub.endpoint}/me/other" in printed, said
    assert "hf_repo_id" not in yaml.safe_load(hub.content("me/other")["config.yaml"])


def test_a_token_that_is_no_good_is_refused_before_the_photos_are_read(hub: PushServer, tiny_command: list[str], tmp_path: Path):
    for token, words in (("hf_wrong", "does not know this token"), (READ_TOKEN, "may read only")):
        code, _, said = trained(hub, tiny_command, tmp_path / "run", "--hf-repo-id", "me/tok", token=token)
        assert code == 2 and words in said and not (tmp_path / "run").exists()
    hub.failures.append(Failure("GET", "/api/whoami-v2", 503))
    code, printed, said = trained(hub, tiny_command, tmp_path / "run", "--hf-repo-id", "me/tok", token=GOOD_TOKEN)
    assert code == 0 and "is not known yet: the hub is busy" in said and "pushed:" in printed
