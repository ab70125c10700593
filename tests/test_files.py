"""Hub repositories behind names: the cache first, commits that stay, consent, and no waiting without a network."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_llama

from nitro_e import files
from nitro_e.config import ConfigError, from_dict
from nitro_e.encoders.components import ComponentConfig, build_text_encoder, pinned
from nitro_e.files import SHIPPED
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.sources import Use

ROOT = Path(__file__).parent.parent


def test_downloads_once_and_says_the_commit(hub, capsys):
    commit = hub.publish("me/mine", {"config.json": b"{}", "model.safetensors": b"1", "big.bin": b"unwanted"})
    folder = files.fetch("me/mine", ("config.json", "model*.safetensors", "absent.json?"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert f"downloaded me/mine at commit {commit}\n" in capsys.readouterr().err
    asked = len(hub.asked)
    hub.publish("me/mine", {"config.json": b"{}", "model.safetensors": b"moved on"})
    assert files.fetch("me/mine", ("config.json", "model*.safetensors")) == folder
    assert len(hub.asked) == asked and capsys.readouterr().err == ""
    assert files.commit_of("me/mine") == commit


def test_what_the_cache_lacks_is_asked_for(hub):
    hub.publish("me/mine", {"config.json": b"{}", "model.safetensors": b"1"})
    folder = files.fetch("me/mine", ("config.json",))
    assert not (folder / "model.safetensors").exists()
    assert files.fetch("me/mine", ("config.json", "old.bin|model*.safetensors")) == folder
    assert (folder / "model.safetensors").read_bytes() == b"1"
    with pytest.raises(FileNotFoundError, match="there is no vocab.json or merges.txt"):
        files.fetch("me/mine", ("config.json", "vocab.json|merges.txt"))


def test_a_pinned_repository_is_read_at_its_commit(hub):
    name, commit = "openai/clip-vit-large-patch14", files.REVISIONS["openai/clip-vit-large-patch14"]
    hub.publish(name, {"config.json": b"the pinned one"}, commit)
    newest = hub.publish(name, {"config.json": b"the newest"})
    assert (files.fetch(name, ("config.json",)) / "config.json").read_bytes() == b"the pinned one"
    assert files.fetch(name, ("config.json",), "main").name == newest
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in files.REVISIONS.values() if commit)


def test_every_default_repository_has_an_entry():
    """Whatever a source file calls a hub repository is in REVISIONS."""
    named = set()
    for path in (ROOT / "nitro_e").rglob("*.py"):
        named |= set(re.findall(r'^[A-Z0-9_, ]+ = "(\w[\w.-]*/\w[\w.-]*)"', path.read_text(), re.MULTILINE))
    named.discard("application/octet-stream")  # a type of content
    assert len(named) >= 10 and named <= set(files.REVISIONS)
    assert "amd/Nitro-E" in files.REVISIONS


def test_weights_record_the_commit_they_were_made_with(hub, tmp_path, monkeypatch):
    save_llama(tmp_path / "llama")
    commit = hub.publish("me/llama", tmp_path / "llama")
    text = ComponentConfig(name="llama-3.2-1b", path="me/llama", length=8)
    first = build_text_encoder(text).encode(["a red circle"]).tokens
    save_llama(tmp_path / "other", seed=1)
    hub.publish("me/llama", tmp_path / "other")
    use = Use(codec=ComponentConfig(name="dc-ae-f32c32"), text=text, sampling=from_dict_sampling())
    assert use.text.revision == commit
    assert use.codec.revision == files.REVISIONS["mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"]
    assert pinned(ComponentConfig(name="shapes-llama")).revision is None  # it comes with the package
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another machine"))
    assert build_text_encoder(use.text).encode(["a red circle"]).tokens.equal(first)


def from_dict_sampling():
    return from_dict(Use, json.loads((SHIPPED / "model/config.json").read_text())["use"]).sampling


@pytest.fixture
def foreign(tmp_path):
    """The shipped weights, but their config.json names the text encoder's hub repository."""

    def make(path, revision=None, name="shapes-llama"):
        folder = tmp_path / "foreign"
        folder.mkdir(exist_ok=True)
        config = json.loads((SHIPPED / "model/config.json").read_text())
        config["use"]["text"] |= {"path": path, "revision": revision, "name": name}
        (folder / "config.json").write_text(json.dumps(config))
        if not (folder / "model.safetensors").exists():
            (folder / "model.safetensors").symlink_to(SHIPPED / "model/model.safetensors")
        return folder

    return make


def test_weights_of_a_stranger_fetch_nothing_without_consent(hub, foreign):
    hub.publish("evil/text", SHIPPED / "text")
    with pytest.raises(ConfigError, match="'evil/text'.*--allow-download evil/text"):
        TextToImage.from_pretrained(foreign("evil/text"))
    stranger = hub.publish("meta-llama/Llama-3.2-1B", {"config.json": b"of an open pull request"})
    with pytest.raises(ConfigError, match=f"Llama-3.2-1B' at revision '{stranger}'"):
        TextToImage.from_pretrained(foreign("meta-llama/Llama-3.2-1B", stranger, "llama-3.2-1b"))
    # a string is one name, not a container of its parts
    with pytest.raises(ConfigError, match="'evil/text'"):
        TextToImage.from_pretrained(foreign("evil/text"), allow_download="not-evil/text")
    assert hub.asked == []
    pipeline = TextToImage.from_pretrained(foreign("evil/text"), allow_download=["evil/text"])
    assert len(pipeline(["a red circle"], steps=1)) == 1
    assert TextToImage.from_pretrained(foreign("evil/text"), text=str(SHIPPED / "text"))


def run(arguments, tmp_path, **environment):
    """A fresh interpreter with an empty cache."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | environment
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )


def test_consent_on_the_command_line(hub, foreign, tmp_path):
    commit = hub.publish("evil/text", SHIPPED / "text")
    command = [ROOT / "sample.py", foreign("evil/text"), "--prompt", "a red circle", "--steps", "1"]
    refused = run(command, tmp_path, HF_ENDPOINT=hub.url)
    assert refused.returncode == 2 and refused.stderr.startswith("error: use.text: these weights ask for")
    assert refused.stderr.count("\n") == 1 and hub.asked == []
    done = run([*command, "--allow-download", "evil/text"], tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert f"downloaded evil/text at commit {commit}" in done.stderr


CODE = """
from nitro_e.encoders.components import ComponentConfig, build_text_encoder
from nitro_e.cli import common as cli
import sys
sys.exit(cli.run(lambda: build_text_encoder(ComponentConfig(name="llama-3.2-1b"))))
"""


@pytest.mark.parametrize(
    "environment, reason",
    [
        # nobody listens at port 9: refused at once
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached: [Errno 111] Connection refused"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to ask the hub"),
    ],
)
def test_without_a_network_there_is_one_line_and_no_retry(environment, reason, tmp_path):
    done = run(["-c", CODE], tmp_path, **environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert reason in done.stderr
    commit = files.REVISIONS["meta-llama/Llama-3.2-1B"]
    assert f"`hf download meta-llama/Llama-3.2-1B --revision {commit} --local-dir FOLDER`" in done.stderr


def test_a_folder_is_published_whole_or_not_at_all(tmp_path):
    """What a failed block wrote is removed, and so is what a killed process left behind."""
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / f"out.{socket.gethostname()}.{killed.pid}.tmp").mkdir()
    with files.atomic_path(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "whole").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]
