"""Prompts in the player's own words: the embedding is diffusers', the cache answers alone, and
every mistake is one sentence.
"""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from worldmodel.client.scenes import Scene, Scenes
from worldmodel.models import text_encoder
from worldmodel.models.prompts import PromptBook
from worldmodel.models.text_encoder import PromptEncoder, clean, embed_text, locate
from worldmodel.recording import Recorder, replay, verify
from worldmodel.session import Session
from worldmodel.worlds.world import World

transformers = pytest.importorskip("transformers")
ftfy = pytest.importorskip("ftfy")
ROOT = Path(__file__).parent.parent
LENGTH = 12
WIDTH = 8
SHAPE = (LENGTH, WIDTH)
ENGLISH = "a red house by the sea"
CHINESE = "海边的红房子"
LONG = "a red house by the sea " * 500
MESSY = "  caf&amp;eacute; &lt;b&gt;\tschÃ¶n\n\n“red”\u00a0sea  "


def make_encoder(folder, seed=0, **sizes):
    """A random UMT5 of two layers and a tokenizer of a few words and letters, in diffusers'
    layout.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁a",
        "▁red",
        "▁house",
        "▁by",
        "▁the",
        "▁sea",
        *CHINESE,
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    tokenizer = Tokenizer(
        models.Unigram([(word, -float(rank)) for rank, word in enumerate(words)], unk_id=2)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(words),
        "d_model": WIDTH,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 2,
        "num_heads": 2,
        **sizes,
    }
    transformers.UMT5EncoderModel(transformers.UMT5Config(**config)).save_pretrained(
        folder / "text_encoder"
    )
    return folder


@pytest.fixture(scope="module")
def whole_encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder") / "umt5")


@pytest.fixture
def encoder(whole_encoder, tmp_path):
    """Folder of an encoder that the test may break."""
    return shutil.copytree(whole_encoder, tmp_path / "umt5")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The user's cache folder, empty; and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "worldmodel" / "prompts"


def embed(prompt, place, shape=SHAPE, dtype=torch.float32, tell=lambda stage: None):
    return embed_text(prompt, place, shape, torch.device("cpu"), dtype, tell)


def only_file(cache):
    (file,) = cache.iterdir()  # and no temporary file
    return file


def forbid_loading(monkeypatch):
    """Whoever loads the encoder from now on fails the test."""

    def load(*_, **__):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(text_encoder, "_load", load)


# -------------------- encoding


@pytest.fixture(scope="module")
def pipeline(whole_encoder):
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    tokenizer = transformers.AutoTokenizer.from_pretrained(whole_encoder, subfolder="tokenizer")
    network = transformers.UMT5EncoderModel.from_pretrained(
        whole_encoder, subfolder="text_encoder"
    ).eval()
    codec = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    return WanPipeline(tokenizer, network, codec, FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("prompt", [ENGLISH, CHINESE, LONG, MESSY, "sea"])
@pytest.mark.parametrize("length", [3, 512])
def test_the_embedding_is_that_of_diffusers(pipeline, whole_encoder, prompt, length):
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=length
        )
    for _ in ("encoded", "from the cache"):
        ours = embed(prompt, whole_encoder, (length, WIDTH))
        assert ours.shape == (length, WIDTH) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-6)
    own = len(pipeline.tokenizer(clean(prompt)).input_ids)
    assert torch.all(ours[own:] == 0) and torch.all(ours[:own].abs().sum(1) > 0)


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH,
        CHINESE,
        MESSY,
        "a\u2003b\x1fc\x85d",
        "&amp;amp;lt;",
        "x\u200b y",
        "ﬁne…",
        "&nbsp;e&#28;f",
    ],
)
def test_text_is_cleaned_as_diffusers_does(text):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean(text) == prompt_clean(text)


@pytest.mark.parametrize("text", ["", "  \n", "&nbsp; &amp;nbsp;"])
def test_an_empty_text_is_refused(whole_encoder, text):
    with pytest.raises(ValueError, match="The prompt is empty"):
        embed(text, whole_encoder)


def test_a_long_text_is_cut_with_a_warning(whole_encoder, caplog):
    for _ in ("encoded", "from the cache"):
        cut = embed(LONG, whole_encoder)
        assert [said for said in caplog.messages if "tokens" in said] == [
            "The prompt has 3001 tokens and this world reads 12; the rest of it was left out."
        ]
        caplog.clear()
    assert torch.all(cut.abs().sum(1) > 0)
    embed(ENGLISH, whole_encoder)
    assert "tokens" not in caplog.text


def test_the_encoder_is_freed(whole_encoder, monkeypatch):
    born = []
    load = text_encoder._load

    def watched(kind, *arguments, **options):
        loaded = load(kind, *arguments, **options)
        if kind is transformers.UMT5EncoderModel:
            born.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(text_encoder, "_load", watched)
    gc.disable()
    try:
        embed(ENGLISH, whole_encoder)
        assert len(born) == 1 and born[0]() is None
    finally:
        gc.enable()


def test_a_full_card_leaves_the_work_to_the_cpu(whole_encoder, monkeypatch, cache):
    run = text_encoder._run
    places = []

    def crowded(network, batch, device):
        places.append(device.type)
        if len(places) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(network, batch, device)

    usual = embed(ENGLISH, whole_encoder)
    shutil.rmtree(cache)
    monkeypatch.setattr(text_encoder, "_run", crowded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = embed_text(ENGLISH, whole_encoder, SHAPE, torch.device("cuda"), torch.float32)
    assert places == ["cuda", "cpu"] and torch.equal(found, usual)


# -------------------- cache


def test_the_cache_answers_without_the_encoder(encoder, monkeypatch, cache):
    first = embed(CHINESE, encoder)
    forbid_loading(monkeypatch)
    assert only_file(cache).stat().st_size < 2000  # its own rows only
    stages = []
    assert torch.equal(
        embed(f"  {CHINESE}\n", encoder, tell=stages.append), first
    )  # cleaned to the same
    shutil.rmtree(encoder)
    assert torch.equal(embed(CHINESE, encoder, tell=stages.append), first) and stages == []


@pytest.mark.slow
def test_each_text_length_type_and_encoder_has_its_own_file(encoder, tmp_path, cache):
    first = embed(ENGLISH, encoder)
    embed(CHINESE, encoder)
    embed(ENGLISH, encoder, (5, WIDTH))
    embed(ENGLISH, encoder, dtype=torch.bfloat16)
    other = make_encoder(tmp_path / "other", seed=1)
    assert not torch.allclose(embed(ENGLISH, other), first)
    assert len(list(cache.iterdir())) == 5


def test_another_encoder_in_the_same_place_is_asked_anew(encoder):
    first = embed(ENGLISH, encoder)
    shutil.rmtree(encoder)
    make_encoder(encoder, seed=1)
    second = embed(ENGLISH, encoder)
    assert not torch.allclose(first, second) and torch.equal(embed(ENGLISH, encoder), second)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 64
    file.write_bytes(data)


DAMAGE = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"embedding" * 40),
    "a flipped bit": flip,
    "another file": lambda file: save_file({"rows": torch.zeros(3, WIDTH)}, file),
    "odd facts": lambda file: save_file(load_file(file), file, {"facts": "[1]"}),
}


def test_a_damaged_file_is_made_anew(encoder, cache):
    first = embed(ENGLISH, encoder)
    whole = only_file(cache).read_bytes()
    for what, damage in DAMAGE.items():
        damage(only_file(cache))
        assert torch.equal(embed(ENGLISH, encoder), first), what
        assert only_file(cache).read_bytes() == whole, what


def test_an_embedding_that_cannot_be_kept_still_plays(encoder, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert embed(ENGLISH, encoder).abs().sum() > 0
    assert "cannot be kept" in caplog.text and cache.read_text().startswith("a file")


def test_the_cache_is_where_the_user_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/folder"):  # XDG: only an absolute path counts
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert text_encoder.cache_folder() == tmp_path / ".cache" / "worldmodel" / "prompts"


# -------------------- mistakes


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_weight(folder):
    weights = load_file(folder / "text_encoder/model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, folder / "text_encoder/model.safetensors", {"format": "pt"})


def only_pickled(folder):
    weights = load_file(folder / "text_encoder/model.safetensors")
    torch.save(weights, folder / "text_encoder/pytorch_model.bin")
    (folder / "text_encoder/model.safetensors").unlink()


BROKEN = {
    "no folder": (
        shutil.rmtree,
        "is not in .*expected text_encoder/config.json and tokenizer there",
    ),
    "no tokenizer": (lambda e: shutil.rmtree(e / "tokenizer"), "tokenizer of .* cannot be loaded"),
    "no config": (
        lambda e: (e / "text_encoder/config.json").unlink(),
        "The text encoder is not in",
    ),
    "torn config": (
        lambda e: (e / "text_encoder/config.json").write_text("{"),
        "text encoder of .* cannot be loaded",
    ),
    "odd config": (
        lambda e: edit_json(e / "text_encoder/config.json", d_kv="four"),
        "text encoder of .* cannot be loaded",
    ),
    "no weights": (
        lambda e: (e / "text_encoder/model.safetensors").unlink(),
        "text encoder of .* cannot be loaded",
    ),
    "torn weights": (
        lambda e: DAMAGE["cut off"](e / "text_encoder/model.safetensors"),
        "text encoder of .* cannot be loaded",
    ),
    "pickled weights": (only_pickled, "text encoder of .* cannot be loaded"),
    "a weight short": (drop_weight, r"lacks the weight encoder\.block\.1"),
    "other width": (
        lambda e: shutil.rmtree(e / "text_encoder") or make_encoder(e, d_model=16),
        "width 16, 8 is expected",
    ),
    "small vocabulary": (
        lambda e: shutil.rmtree(e / "text_encoder") or make_encoder(e, vocab_size=6),
        "larger vocabulary than",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_encoder_is_one_sentence_and_nothing_is_kept(encoder, cache, case):
    breaks, sentence = BROKEN[case]
    breaks(encoder)
    with pytest.raises(ValueError, match=sentence) as caught:
        embed(ENGLISH, encoder)
    assert "\n" not in str(caught.value) and not cache.exists()


def test_code_in_the_files_is_never_run(encoder, tmp_path):
    mark = tmp_path / "it ran"
    for part in ("text_encoder", "tokenizer"):
        (encoder / part / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    edit_json(
        encoder / "text_encoder/config.json",
        auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"},
    )
    edit_json(
        encoder / "tokenizer/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    )
    try:
        embed(ENGLISH, encoder)
    except ValueError as error:
        assert "cannot be loaded" in str(error)
    assert not mark.exists()


def test_no_valid_unicode():
    with pytest.raises(ValueError, match="not valid Unicode"):
        clean("a \udcff house")


@pytest.mark.parametrize("missing", ["transformers", "ftfy"])
def test_a_missing_package_is_named(whole_encoder, monkeypatch, missing):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(
        ValueError, match=f"needs {missing}, which is not installed: run `python -m pip install"
    ):
        embed(ENGLISH, whole_encoder)


# -------------------- hub


def test_an_encoder_of_the_hub_that_is_here_needs_no_network(whole_encoder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--somebody--umt5"
    shutil.copytree(whole_encoder, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    place = locate("somebody/umt5", tmp_path)
    assert place == "somebody/umt5" and text_encoder._version(place) == "abc123"
    found = embed(ENGLISH, place)
    assert torch.equal(found, embed(ENGLISH, whole_encoder))
    shutil.rmtree(tmp_path / "hub")
    assert torch.equal(embed(ENGLISH, place), found)
    with pytest.raises(ValueError, match="text encoder of somebody/umt5 cannot be loaded .*online"):
        embed(CHINESE, place)


@pytest.mark.parametrize("offline", [True, False])
def test_the_network_is_asked_last(monkeypatch, tmp_path, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    asked = []
    stages = []

    class Kind:
        @staticmethod
        def from_pretrained(place, subfolder, local_files_only=False):
            asked.append((place, subfolder, local_files_only))
            if local_files_only:
                raise OSError("half of it is here")
            return "weights"

    half = tmp_path / "models--somebody--umt5/snapshots/abc123"
    monkeypatch.setattr(text_encoder, "_folder", lambda place: half)
    load = partial(text_encoder._load, Kind, part="tokenizer", progress=stages.append)
    with pytest.raises(
        ValueError, match=r"tokenizer of .* cannot be loaded \(half of it is here\); fetch it again"
    ):
        load(place=Path("/encoder"))
    assert asked == [(half, "tokenizer", True)]  # a folder is never looked for on the network
    if offline:
        with pytest.raises(ValueError, match=r"\(half of it is here\); fetch it while online"):
            load(place="somebody/umt5")
        assert len(asked) == 2 and stages == []
    else:
        assert load(place="somebody/umt5") == "weights"
        assert asked[1:] == [
            (half, "tokenizer", True),
            ("somebody/umt5", "tokenizer", False),
        ] and stages == ["Fetching the tokenizer"]


def test_what_a_source_means(whole_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle/in/it").mkdir(parents=True)
    (tmp_path / "near/by").mkdir(parents=True)
    home = tmp_path / "bundle"
    assert locate(".", home) == home and locate("in/it", home) == home / "in/it"
    assert (
        locate("near/by", home) == tmp_path / "near/by"
        and locate(str(whole_encoder), home) == whole_encoder
    )
    assert locate("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", home) == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert (
        locate("/gone/for/good", home) == Path("/gone/for/good")
        and locate("./gone", home) == home / "gone"
    )


# -------------------- play


@pytest.fixture
def bundle(tiny_bundle, tmp_path, encoder):
    """The tiny world with prompts of 12 rows and a text encoder, which made none of them."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "worlds" / "tiny")
    PromptBook({name: torch.randn(SHAPE) for name in ("grey", "loud")}).save(
        folder / "prompts.safetensors"
    )
    values = yaml.safe_load((folder / "world.yaml").read_text())
    (folder / "world.yaml").write_text(yaml.safe_dump({**values, "text_encoder": str(encoder)}))
    return folder


@pytest.fixture
def world(bundle):
    return World.from_pretrained(bundle, dtype=torch.float32)


def generate(session, latents=3):
    return np.concatenate([session.step(np.eye(4)).frames for _ in range(latents)])


def test_a_session_follows_the_prompt(world, encoder):
    session = Session(world, prompt=ENGLISH, seed=3)
    shown = generate(session)
    assert session.prompt == ENGLISH
    shutil.rmtree(encoder)
    again = Session(
        replace(world), prompt=ENGLISH, seed=3
    )  # another opening of the world: the cache answers
    assert np.array_equal(generate(again), shown)
    with pytest.raises(ValueError, match="The text encoder is not in"):
        again.set_prompt(CHINESE)
    assert again.prompt == ENGLISH
    again.set_prompt("loud")
    assert not np.array_equal(generate(again), generate(session))


def test_another_prompt_gives_other_frames(world):
    assert not np.array_equal(
        generate(Session(world, prompt=ENGLISH)), generate(Session(world, prompt=CHINESE))
    )


def test_stored_names_need_no_encoder(world, monkeypatch):
    forbid_loading(monkeypatch)
    assert torch.equal(world.prompt_encoder.embed("loud"), world.prompts["loud"])
    assert "loud" in world.prompt_encoder and ENGLISH not in world.prompt_encoder


def test_a_world_without_an_encoder_knows_its_names_only(tiny_world):
    with pytest.raises(ValueError, match="Unknown prompt 'a red house by the sea'; did you mean"):
        Session(tiny_world, prompt=ENGLISH)
    assert isinstance(tiny_world.prompt_encoder, PromptEncoder)


def test_scenes_say_what_takes_long_once(world, caplog):
    stages = []
    scenes = Scenes(world, tell=lambda stage, progress: stages.append(stage))
    session, scene = scenes.open(Scene(LONG))
    assert stages == [
        "Loading the text encoder",
        "Reading the prompt",
        "Dreaming the first picture",
    ]
    assert scene == Scene(LONG, None, 0) and session.image is None  # it has no start picture
    scenes.open(scenes.new_seed(scene))
    assert len(stages) == 3 and caplog.text.count("was left out") == 1
    assert scenes.next_prompt(scene).prompt == "grey"
    assert scenes.open(Scene(CHINESE, "loud-1"))[0].image is not None


@pytest.mark.slow
def test_replay_finds_the_words_again(world, encoder, tmp_path, cache):
    session = Session(world, prompt=CHINESE, seed=5)
    with Recorder(tmp_path / "take", session) as recorder:
        for prompt in (CHINESE, "loud", ENGLISH):
            session.set_prompt(prompt)
            recorder.write(session.step(np.eye(4)), np.eye(4))
    assert yaml.safe_load((tmp_path / "take/meta.yaml").read_text("utf-8"))["caption"] == CHINESE
    shutil.rmtree(cache)
    assert verify(tmp_path / "take", replace(world))["exact"]  # encoded again
    shutil.rmtree(encoder)
    assert verify(tmp_path / "take", replace(world))["exact"]  # from the cache
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match="The text encoder is not in"):
        next(replay(tmp_path / "take", replace(world)))


def test_a_saved_session_keeps_its_words(world, tmp_path):
    session = Session(world, prompt=CHINESE)
    generate(session)
    session.save(tmp_path / "saved")
    again = Session.load(tmp_path / "saved", replace(world))
    assert again.prompt == CHINESE and np.array_equal(generate(again), generate(session))


@pytest.mark.parametrize("prompt", [CHINESE, LONG])
def test_play_without_a_window(play, bundle, encoder, tmp_path, capsys, prompt):
    walk = ["--headless", "--trajectory", "w*2", "--threads", "1"]
    start = [
        "--world",
        str(bundle),
        "--prompt",
        prompt,
        "--output",
        str(tmp_path / "walk.mp4"),
        "--record",
        str(tmp_path / "take"),
    ]
    assert play([*walk, *start]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["latents"] == 3
    assert "Loading the text encoder ..." in printed.err and printed.err.count("was left out") == (
        prompt == LONG
    )
    shutil.rmtree(encoder)
    assert (
        play(
            [
                "--world",
                str(bundle),
                "--replay",
                str(tmp_path / "take"),
                "--verify",
                "--threads",
                "1",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["exact"] is True


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "--prompt is empty"),
        (" ", "--prompt is empty"),
        ("&nbsp;", "The prompt is empty"),
        (ENGLISH, "The text encoder is not in"),
    ],
)
def test_what_cannot_be_played_is_one_sentence(
    play, bundle, encoder, tmp_path, capsys, prompt, sentence
):
    shutil.rmtree(encoder)
    output = tmp_path / "walk.mp4"
    assert (
        play(
            [
                "--world",
                str(bundle),
                "--headless",
                "--trajectory",
                "w*2",
                "--prompt",
                prompt,
                "--output",
                str(output),
            ]
        )
        == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("...")]
    assert len(lines) == 1 and sentence in lines[0] and not output.exists()


def test_an_empty_prompt_in_a_world_without_an_encoder(play, tiny_bundle, capsys):
    assert play(["--world", str(tiny_bundle), "--prompt", ""]) == 2
    assert "--prompt is empty" in capsys.readouterr().err
