"""Sources: what a text means, what of a hub repository is fetched, and what is said when something
cannot be had.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from worldmodel.files import world_cache
from worldmodel.worlds.hub import (
    HubPath,
    SourceError,
    fetch,
    parse_source,
    read_index,
    weights_among,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = '{"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}'
DIFFUSERS = (
    "model_index.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "transformer/config.json",
    "vae/config.json",
    "transformer/m.safetensors.index.json",
    "transformer/m-00001-of-00002.safetensors",
    "transformer/m-00002-of-00002.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
ORIGINAL = (
    "Wan2.1_VAE.pth",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "models_t5_umt5-xxl-enc-bf16.pth",
)


def write(root: Path, names) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(INDEX if name.endswith(".index.json") else name)
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub library, and no connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, repository: str, names) -> Path:
    """Puts a repository into the cache as the hub library lays it out."""
    root = cache / f"models--{repository.replace('/', '--')}"
    write(root / "snapshots" / COMMIT, names)
    write(root, ["refs/main"])
    (root / "refs/main").write_text(COMMIT)
    return root / "snapshots" / COMMIT


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub: `hub.repositories[name]` = names of files; `hub.fetched` = what was downloaded."""
    state = SimpleNamespace(repositories={}, fetched=[], error=None, broken=None)

    def model_info(_, repository, *, revision, files_metadata, timeout):
        if state.error:
            raise state.error
        files = [
            SimpleNamespace(rfilename=name, size=2_000_000)
            for name in state.repositories[repository]
        ]
        return SimpleNamespace(siblings=files)

    def hf_hub_download(repo_id, filename, revision, local_files_only):
        if state.broken:
            raise state.broken
        state.fetched.append(filename)
        return str(write(tmp_path / "served", [filename]) / filename)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return state


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("owner/name", HubPath("owner/name")),
        ("owner/name/a/b.pt", HubPath("owner/name", "a/b.pt")),
        ("owner/name@v1/a.pt", HubPath("owner/name", "a.pt", "v1")),
        ("hf:runs/name/", HubPath("runs/name")),
    ],
)
def test_places_on_the_hub(text, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    assert parse_source(text) == place


def test_what_is_here_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert parse_source("owner/name") == fetch("owner/name") == Path("owner/name")
    assert parse_source("hf:owner/name") == HubPath("owner/name")
    for absent in (
        "owner/nam",
        "./owner/other",
        "/absent/file.pt",
        "file.pt",
        "",
        "hf:owner",
        "hf:",
    ):
        with pytest.raises(SourceError, match="there is no file or folder"):
            parse_source(absent)


def test_which_files_are_weights():
    assert weights_among(DIFFUSERS) == ["transformer/m.safetensors.index.json"]
    assert weights_among(DIFFUSERS, "vae") == ["vae/diffusion_pytorch_model.safetensors"]
    assert weights_among(ORIGINAL) == ["diffusion_pytorch_model.safetensors"]
    assert weights_among(["a.pt", "b.pt", "deep/c.pt", "notes.txt"]) == ["a.pt", "b.pt"]


def test_only_what_is_wanted_is_fetched(hub):
    hub.repositories = {
        "wan/diffusers": DIFFUSERS,
        "wan/original": ORIGINAL,
        "min/wm": ["W/dmd/model.pt", "W/cd/model.pt", "README.md"],
    }
    said = []
    assert fetch("wan/diffusers", progress=said.append).name == "m.safetensors.index.json"
    assert sorted(hub.fetched) == sorted(
        name for name in DIFFUSERS if name.startswith("transformer/")
    )
    assert len(said) == 2 and "2 files of wan/diffusers (4.0 MB) into" in said[-1]
    for source, part, name in (
        ("wan/diffusers", "vae", "vae/diffusion_pytorch_model.safetensors"),
        ("wan/original", "transformer", "diffusion_pytorch_model.safetensors"),
        ("min/wm/W/dmd", "transformer", "W/dmd/model.pt"),
        ("min/wm/W/cd/model.pt", "vae", "W/cd/model.pt"),
    ):
        hub.fetched.clear()
        assert str(fetch(source, part)).endswith(name)
        assert set(hub.fetched) - {name, str(Path(name).with_name("config.json"))} == set()


def test_where_there_are_several_they_are_named(hub):
    hub.repositories = {"min/wm": ["a/one.pt", "a/two.pt", "b.pt"], "text/only": ["README.md"]}
    with pytest.raises(
        SourceError,
        match=(
            r"min/wm/a is not one weights file: min/wm has a/one.pt, a/two.pt; name one, "
            r"as in min/wm/a/"
        ),
    ):
        fetch("min/wm/a")
    with pytest.raises(
        SourceError,
        match=r"min/wm/c.pt is not one weights file: min/wm has a/one.pt, a/two.pt, b.pt; name one",
    ):
        fetch("min/wm/c.pt")
    with pytest.raises(SourceError, match="text/only has none"):
        fetch("text/only")


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


def test_what_the_hub_refuses(hub):
    hub.error = RepositoryNotFoundError("404", response=response(404))
    with pytest.raises(SourceError, match="no repository no/body on the hub that you may read"):
        fetch("no/body")
    hub.error = RevisionNotFoundError("404", response=response(404))
    with pytest.raises(SourceError, match="some/body has no revision 'v9'"):
        fetch("some/body@v9")


def test_a_broken_download(hub):
    hub.repositories = {"min/wm": ["a.pt"]}
    hub.broken = ConnectionResetError(104, "peer went away")
    with pytest.raises(
        SourceError,
        match=r"a.pt from min/wm broke off \(\[Errno 104\] peer went away\): start again",
    ):
        fetch("min/wm/a.pt")
    hub.broken = LocalEntryNotFoundError("An error happened.\nAnd more")
    with pytest.raises(
        SourceError,
        match=(
            r"a.pt of min/wm cannot be had: the hub cannot be reached \(An error "
            r"happened\) and the cache"
        ),
    ):
        fetch("min/wm/a.pt")
    hub.broken = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left") as caught:
        fetch("min/wm/a.pt")
    assert not isinstance(caught.value, ValueError)


def test_the_cache_answers_without_a_connection(cache, monkeypatch):
    snapshot = cached(cache, "wan/diffusers", DIFFUSERS)
    assert fetch("wan/diffusers") == snapshot / "transformer/m.safetensors.index.json"
    assert fetch("wan/diffusers@main/vae") == snapshot / "vae/diffusion_pytorch_model.safetensors"
    assert fetch(f"wan/diffusers@{COMMIT}", "vae").parent == snapshot / "vae"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda *_, **__: (_ for _ in ()).throw(OfflineModeIsEnabled("no route")),
    )
    assert fetch("wan/diffusers") == snapshot / "transformer/m.safetensors.index.json"
    cached(cache, "min/wm", ["a.pt", "b.pt"])
    with pytest.raises(SourceError, match="min/wm is not one weights file: min/wm has a.pt, b.pt"):
        fetch("min/wm")


def test_what_the_cache_lacks_is_named(cache):
    with pytest.raises(
        SourceError,
        match=(
            rf"a/b.pt of min/wm cannot be had: HF_HUB_OFFLINE is set and the cache {cache} "
            rf"does not"
        ),
    ):
        fetch("min/wm/a/b.pt")
    snapshot = cached(cache, "wan/diffusers", DIFFUSERS)
    with pytest.raises(
        SourceError, match="vae/, or a single file of weights, of wan/other cannot be had"
    ):
        fetch("wan/other", "vae")
    (snapshot / "transformer/m-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        SourceError,
        match=(
            r"transformer/m-00002-of-00002.safetensors of wan/diffusers cannot be had: "
            r"HF_HUB_OFFLINE"
        ),
    ):
        fetch("wan/diffusers")
    (snapshot / "transformer/m.safetensors.index.json").write_text(INDEX[:40])
    with pytest.raises(SourceError, match="is not an index of weights files"):
        fetch("wan/diffusers")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../b"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_damaged_indices(tmp_path, text):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(SourceError, match="is not an index of weights files"):
        read_index(path)


def test_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert world_cache("w") == tmp_path / "worldmodel/worlds/w"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert world_cache("w") == Path.home() / ".cache/worldmodel/worlds/w"


def test_the_hub_library_waits():
    code = "import sys, worldmodel.worlds.hub as hub; hub.fetch('.')"
    code += "; print('huggingface_hub' in sys.modules)"
    root = Path(__file__).parent.parent
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert shown.stdout.strip() == "False"
