"""What a run remembers of its pushes, and what must not get out by them whatever has happened before."""

import signal
import time
from pathlib import Path

import pytest
import yaml
from hub_server import Repository
from push_server import Failure, PushServer
from pushing import FILES, SECRET, copy_with_secrets, pushed, record, started

from lorabooth.runs import RunDir


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunDir:
    """A finished run in whose photos, captions and path stand secrets."""
    return copy_with_secrets(tiny_run, tmp_path)


def test_what_this_run_has_pushed_stays_its_own_whatever_was_tried_since(hub: PushServer, run: RunDir):
    for name in ("me/tok", "my-team/tok"):
        assert pushed(hub, str(run.path), name).returncode == 0
    assert pushed(hub, str(run.path), "you/tok").returncode == 2
    assert pushed(hub, str(run.path), "me/tok").returncode == 0
    hub.failures.append(Failure("POST", "/commit/", 403))
    made = record(run)["commit"]
    run.write_json("likeness.json", {"by": "a drawing", "scores": {"identity right": 1.0}})
    assert pushed(hub, str(run.path)).returncode == 2
    assert record(run)["commit"] == made != "" and record(run)["earlier"] == ["my-team/tok"]


def test_what_is_to_be_private_does_not_go_where_everybody_sees_it(hub: PushServer, run: RunDir):
    public = hub.folder / "me" / "tok"
    public.mkdir(parents=True)
    (public / ".gitattributes").write_text("")
    hub.repositories["me/tok"] = Repository(public)
    for arguments in (("me/tok", "--private"), (), ("--force",)):
        done = pushed(hub, str(run.path), *arguments)
        assert done.returncode == 2 and "me/tok exists and is public, and a private one was asked for" in done.stderr
        assert not hub.commits and not hub.large
    hub.private["me/tok"] = True
    assert pushed(hub, str(run.path)).returncode == 0 and len(hub.commits) == 1
    hub.private["me/tok"] = False  # the owner shows on the hub what was private
    for _ in range(2):
        assert pushed(hub, str(run.path)).returncode == 2
    assert pushed(hub, str(run.path), "--public").returncode == 0
    for arguments in (("--private",), ()):  # what this run made public is no place for a private one either
        assert pushed(hub, str(run.path), *arguments).returncode == 2
    assert pushed(hub, str(run.path), "me/other", "--public").returncode == 0 and not hub.private["me/other"]


def test_no_path_and_no_account_is_pushed_also_where_the_base_is_on_a_disk_that_is_gone(hub: PushServer, run: RunDir):
    config = run.config.model_dump(mode="json")
    paths = {"model": f"/mnt/{SECRET}/flux", "caption_model": f"~/{SECRET}/qwen"}
    run.write_json("config.json", config | paths | {f"wandb_{name}": SECRET for name in ("entity", "run", "project")})
    assert pushed(hub, str(run.path), "me/tok").returncode == 0
    recipe = yaml.safe_load(hub.content("me/tok")["config.yaml"])
    assert (recipe["model"], recipe["caption_model"]) == ("flux", "qwen")
    assert not [name for name, content in hub.content("me/tok").items() if SECRET.encode() in content]


def test_damage_in_the_run_is_a_sentence(hub: PushServer, run: RunDir):
    next(run.samples.glob("step-000004-*.png")).write_bytes(b"no picture")
    done = pushed(hub, str(run.path), "me/tok")
    assert done.returncode == 0 and "step-000004-0.png is damaged, and not pushed" in done.stderr
    assert sorted(hub.content("me/tok")) == FILES[:-1]
    for content in ("{torn", "[1]", '{"repository": 1, "colour": "red"}'):
        (run.path / "pushed.json").write_text(content)
        done = pushed(hub, str(run.path))
        assert done.returncode == 2 and "pushed.json is damaged" in done.stderr


def test_a_training_killed_before_its_push_has_said_where_it_goes(hub: PushServer, run: RunDir):
    run.write_json("config.json", run.config.model_dump(mode="json") | {"hf_repo_id": "me/tok", "hf_private": True})
    assert pushed(hub, str(run.path)).returncode == 0 and hub.private == {"me/tok": True}


def test_ctrl_c_before_anything_was_made_leaves_the_mark_too(hub: PushServer, run: RunDir):
    hub.failures.append(Failure("GET", "/api/whoami-v2", 503, times=100))
    process = started(hub, "push", str(run.path), "me/tok")
    while not (run.path / "pushed.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and record(run)["repository"] == "me/tok" and not hub.repositories


def test_where_large_files_go_by_xet_a_failure_of_that_is_a_sentence(hub: PushServer, run: RunDir):
    done = pushed(hub, str(run.path), "me/tok", HF_HUB_DISABLE_XET="0")  # as installed; the stand-in has no such storage
    assert done.returncode == 2 and "the connection to the hub broke off (ConnectionError)" in done.stderr and not hub.commits
    assert any("/xet-write-token/" in call.path for call in hub.calls)
    assert pushed(hub, str(run.path)).returncode == 0 and len(hub.commits) == 1
