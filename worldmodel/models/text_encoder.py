"""Prompts in the player's own words: UMT5 turns them into embeddings, which a cache on disk keeps.

The encoder is larger than any world: it is loaded for a text that the cache does not hold, and
freed before play goes on.
"""

import gc
import hashlib
import html
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from worldmodel.errors import UserError, first_line
from worldmodel.files import replacing_file, user_cache
from worldmodel.models.prompts import PromptBook

logger = logging.getLogger(__name__)

ENCODER = "text_encoder"  # sub-folders of diffusers' layout
TOKENIZER = "tokenizer"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
Place = Path | str  # a folder, or the id of a repository on the hub


class PromptEncoder:
    """Embeds every prompt of a world: names in its book, and any text when it names a text encoder.

    book: stored prompts; their shape [L, D] is that of every embedding. source: folder or hub id in
    diffusers' layout, ""
    for stored prompts only. home: the bundle, in which a relative folder is looked for first.
    device, dtype: where the encoder computes, and in what.
    """

    def __init__(
        self, book: PromptBook, source: str, home: Path, device: torch.device, dtype: torch.dtype
    ):
        self._book = book
        self._source = source
        self._home = Path(home)
        self._device = device
        self._dtype = dtype
        self._embedded: dict[str, Tensor] = {}

    def __contains__(self, prompt: object) -> bool:
        """Whether `embed` answers at once."""
        return prompt in self._book or prompt in self._embedded

    def embed(self, prompt: str, progress: Callable[[str], object] = logger.info) -> Tensor:
        """A stored name, or any text as `embed_text` does -> [L, D] float32 on the CPU.

        Errors: also UserError for an unknown name in a world without a text encoder.
        """
        if prompt in self._book or not self._source:
            return self._book[prompt]
        if prompt not in self._embedded:
            place = locate(self._source, self._home)
            self._embedded[prompt] = embed_text(
                prompt, place, self._book.shape, self._device, self._dtype, progress
            )
        return self._embedded[prompt]


def embed_text(
    prompt: str,
    place: Place,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str], object] = logger.info,
) -> Tensor:
    """Any text -> [L, D] = `shape` float32 on the CPU: from the cache, or from the encoder at
    `place` and then into the cache.

    device, dtype: where the encoder computes, and in what. progress: is called with a
    sentence before each long step. A text that is too long loses its end, with a warning. Errors:
    UserError for an empty text, and for an encoder that is absent, damaged or of another width.
    """
    text = clean(prompt)
    (length, width) = shape
    key = {
        "text": text,
        "encoder": str(place),
        "length": length,
        "width": width,
        "dtype": str(dtype),
    }
    path = (
        cache_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    )
    kept = _read(path, key, _version(place))
    if kept is None:
        kept = encode(place, text, length, width, device, dtype, progress)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            _write(path, key, _version(place), *kept)
        except (OSError, SafetensorError, UserError) as error:
            reason = first_line(error)
            logger.warning(
                f"The prompt's embedding cannot be kept in {path.parent} ({reason}); it is "
                "computed again next time."
            )
    rows, tokens = kept
    if tokens > length:
        logger.warning(
            f"The prompt has {tokens} tokens and this world reads {length}; the rest of it was "
            "left out."
        )
    return torch.cat([rows, rows.new_zeros(length - len(rows), width)])


def clean(text: str) -> str:
    """The text as diffusers' WanPipeline embeds it: mended by ftfy, HTML entities resolved twice,
    single spaces.

    Errors: UserError when nothing is left, or when it is not valid Unicode. Differs: ftfy is not
    optional, so that one text has one embedding.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            "The prompt is not valid Unicode text; type it again in a terminal that speaks UTF-8."
        ) from None
    _, ftfy = libraries()
    text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
    if not text:
        raise UserError(
            "The prompt is empty; describe a place in a few words, or omit it to use the "
            "world's own."
        )
    return text


def locate(source: str, home: Path) -> Place:
    """What `text_encoder` in world.yaml means: a folder (in the bundle `home`, or as written) or
    else a hub id.
    """
    for folder in (home / source, Path(os.path.expanduser(source))):
        if folder.is_dir():
            return folder.resolve()
    # what looks like an id but is an absent folder is an id: a wrong guess costs a sentence, never
    # another encoder's embedding
    return source if _HUB_ID.fullmatch(source) else (home / os.path.expanduser(source)).resolve()


# -------------------- encoding


@torch.no_grad()
def encode(
    place: Place,
    text: str,
    length: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str], object],
) -> tuple[Tensor, int]:
    """Cleaned text -> its rows [n, width] float32 on the CPU with n <= length, and how many tokens
    it has uncut.

    The rows are those of diffusers' WanPipeline (Source: its `_get_t5_prompt_embeds`), which fills
    up with zeros to `length`. A graphics card without room for the encoder leaves the work to the
    CPU. Errors: UserError as in `embed_text`.
    """
    progress("Loading the text encoder")
    transformers, _ = libraries()
    if (
        isinstance(place, Path) and not (place / ENCODER / "config.json").is_file()
    ):  # transformers would guess one
        raise UserError(
            f"The text encoder is not in {place} (expected {ENCODER}/config.json and {TOKENIZER} "
            "there); put it there, or name its place as text_encoder in world.yaml."
        )
    config = _load(transformers.UMT5Config, place, ENCODER, progress)
    if config.d_model != width:
        raise UserError(
            f"The text encoder {place} makes embeddings of width {config.d_model}, {width} is "
            "expected; name another one."
        )
    tokenizer = _load(
        transformers.AutoTokenizer, place, TOKENIZER, progress, trust_remote_code=False
    )
    tokens = len(tokenizer(text, verbose=False).input_ids)
    batch = tokenizer(
        [text],
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    if batch.input_ids.max() >= config.vocab_size:
        raise UserError(
            f"The tokenizer in {place} has a larger vocabulary than its text encoder; download "
            "both again."
        )
    network, report = _load(
        transformers.UMT5EncoderModel,
        place,
        ENCODER,
        progress,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:  # transformers would initialise them at random
        raise UserError(
            f"The text encoder {place} lacks the weight {sorted(report['missing_keys'])[0]}; "
            "fetch it again."
        )
    progress("Reading the prompt")
    try:
        rows = _run(network.eval(), batch, device)
    except torch.OutOfMemoryError:
        rows = _run(network, batch, torch.device("cpu"))
    return rows[: int(batch.attention_mask.sum())].float().cpu().contiguous(), tokens


def _run(network: torch.nn.Module, batch, device: torch.device) -> Tensor:
    """[length, D] of a batch of one."""
    return network.to(device)(
        batch.input_ids.to(device), batch.attention_mask.to(device)
    ).last_hidden_state[0]


def _load(kind, place: Place, part: str, progress: Callable[[str], object], **options):
    """`kind.from_pretrained`, which runs no code of the files': first from this machine, then, for
    a hub id, from the hub.
    """
    here = isinstance(place, Path) or constants.HF_HUB_OFFLINE
    try:
        try:
            return kind.from_pretrained(
                _folder(place), subfolder=part, local_files_only=True, **options
            )
        except Exception:  # for want of a file, each kind has its own
            if here:
                raise
            progress(f"Fetching the {part.replace('_', ' ')}")
            return kind.from_pretrained(place, subfolder=part, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a foreign file can break anything
        todo = (
            "fetch it again"
            if isinstance(place, Path)
            else "fetch it while online, or name its folder as text_encoder in world.yaml"
        )
        raise UserError(
            f"The {part.replace('_', ' ')} of {place} cannot be loaded ({first_line(error)}); "
            f"{todo}."
        ) from error


def _folder(place: Place) -> Path:
    """Where the files are, in the hub library's own cache for a hub id; OSError when nothing is
    there.
    """
    if isinstance(place, Path):
        return place
    try:
        found = try_to_load_from_cache(place, f"{ENCODER}/config.json")
    except HFValidationError as error:  # such as a--b/c
        raise FileNotFoundError(first_line(error)) from None
    if not isinstance(found, str):
        raise FileNotFoundError("it is not on this machine")
    return Path(found).parent.parent


def libraries(
    user: str = "A prompt in your own words",
    instead: str = "choose a prompt that the world has stored",
) -> tuple:
    """(transformers, ftfy); UserError with the line that installs them where one is missing,
    naming the `user` that needs it.
    """
    try:
        import ftfy
        import transformers
    except ImportError as error:
        raise UserError(
            f"{user} needs {error.name}, which is not installed: run `python -m pip install "
            f"transformers ftfy`, or {instead}."
        ) from None
    return transformers, ftfy


# -------------------- cache


def cache_folder() -> Path:
    """Where embeddings are kept."""
    return user_cache() / "prompts"


def _version(place: Place) -> str:
    """What tells one state of an encoder from another without reading its weights; "" when it is
    not there.
    """
    try:
        folder = _folder(place)
        if isinstance(place, str):
            return folder.name  # the commit
        files = sorted(
            path
            for part in (ENCODER, TOKENIZER)
            for path in (folder / part).iterdir()
            if path.is_file()
        )
        facts = [
            (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    except OSError:
        return ""


def _read(path: Path, key: dict, version: str) -> tuple[Tensor, int] | None:
    """(rows, tokens) as `_write` stored them; None when they are absent, damaged, or of another
    state of the encoder.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            rows = file.get_tensor("rows")
        if (
            facts["key"] != key
            or facts["sha256"] != _checksum(rows)
            or (version and facts["version"] not in ("", version))
        ):
            return None
        return rows, facts["tokens"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: dict, version: str, rows: Tensor, tokens: int) -> None:
    facts = {"key": key, "version": version, "tokens": tokens, "sha256": _checksum(rows)}
    with replacing_file(path) as temporary:
        save_file({"rows": rows}, temporary, {"facts": json.dumps(facts)})


def _checksum(rows: Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()
