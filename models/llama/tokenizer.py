"""One tokenizer for four kinds of files: `load_tokenizer`, and the `Tokenizer` that it returns."""

import copy
import functools
import itertools
import operator
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.llama.chat.template import chat_templates_of
from models.llama.formats.gguf import open_gguf
from models.llama.tokenizers.bpe import Piece, Vocabulary
from models.llama.tokenizers.gguf import TURN_ENDS, read_gguf
from models.llama.tokenizers.model import LLAMA3_PAD, LLAMA3_STOPS
from models.llama.tokenizers.model import parse_model, read_sentencepiece, read_tiktoken
from models.llama.tokenizers.spec import is_pad, read_tokenizer_json, token_name
from models.llama.tokenizers.stream import StreamDecoder
from utils.errors import AltiplanoError, ArtifactError, DataError, SamplingError, is_int
from utils.files import InputFile, list_folder, parse_json, read_json

# Far above any real tokenizer: weights passed by mistake are refused before they are read.
_MAX_FILE_BYTES = 256 << 20
_MAX_CONFIG_BYTES = 16 << 20
CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"


class Tokenizer:
    """Text to token ids and back, the same for every kind of file.

    Attributes:
        vocab_size: the largest id plus one. A model may have more rows in its embedding; those
            rows are padding, and sampling must never choose them.
        special_tokens: control tokens, name to id: what the files mark as special, tags
            (`<think>`), and words that a chat template writes around messages. No text becomes one
            of them; but one that is not special does in an assistant's message.
        hidden_ids: ids that no text shows: what the files mark as special, and stop ids.
        bos_id, eos_id, pad_id: None where there is none.
        stop_ids: ids that end an answer.
        adds_bos: whether a prompt of this model starts with BOS.
        chat_templates: jinja sources by name.
        strips_first_space: whether decoding takes away a space at the start of a text.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._codec, config = vocabulary.codec, vocabulary.config
        self.vocab_size = self._codec.vocab_size
        self.strips_first_space = self._codec.strips_first_space
        self.special_tokens = special = dict(vocabulary.special_tokens)
        self.bos_id = special.get(token_name(config, "bos_token"))
        self.eos_id = special.get(token_name(config, "eos_token"))
        self.pad_id = special.get(token_name(config, "pad_token"), config.get("pad_token_id"))
        self.chat_templates = chat_templates_of(config)
        stop_ids = {self.eos_id, *config.get("eos_token_id", ())}
        if "<|eot_id|>" in special:  # Llama 3, whichever file named its tokens
            stop_ids |= {special.get(name) for name in LLAMA3_STOPS}
            self.pad_id = special.get(LLAMA3_PAD, self.pad_id)
        stop_ids |= self._turn_ends(vocabulary)
        self.stop_ids = frozenset(stop_ids - {None})
        self.adds_bos = config.get("add_bos_token") is True
        roles = {self.bos_id, self.eos_id} - {None}
        self.hidden_ids = vocabulary.hidden | roles | self.stop_ids
        self._special = _names_pattern(special, vocabulary.patterns)
        self._continues = True
        tags = {name for name, i in special.items() if i not in self.hidden_ids}
        self._tags = _names_pattern(tags, vocabulary.patterns)

    def _turn_ends(self, vocabulary: Vocabulary) -> set[int]:
        """Ends of turns that the chat templates write, or all where the files name no stop ids."""
        written = "".join(self.chat_templates.values())
        silent = not vocabulary.config.get("eos_token_id")
        ends = {name: self.special_tokens.get(name) for name in TURN_ENDS}
        return {i for n, i in ends.items() if i in vocabulary.hidden and (silent or n in written)}

    @property
    def chat_template(self) -> str | None:
        """The jinja source of the default chat template, if the checkpoint has one."""
        return self.chat_templates.get("default")

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text. Bytes that the vocabulary has no token for are dropped, as by
                llama.cpp (SmolLM2 lacks a few control characters).
            bos: start with BOS.
            eos: end with EOS.
            allow_special: encode names of control tokens as those tokens. Never for text that a
                user wrote: without it, `<|eot_id|>` is seven plain tokens.

        Raises:
            DataError: the text has a lone surrogate.
            ArtifactError: the model has no BOS or EOS token, and it was asked for.
        """
        check_text(text, "text")
        ids = self.encode_pieces(self.split_special(text) if allow_special else [text])
        for wanted, token_id, name in ((bos, self.bos_id, "BOS"), (eos, self.eos_id, "EOS")):
            if wanted and token_id is None:
                raise ArtifactError(f"this tokenizer has no {name} token")
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_pieces(self, pieces: Sequence[Piece], continues: bool = False) -> list[int]:
        """Token ids of plain text (str) and control tokens (int).

        Args:
            pieces: texts that stand side by side are one text.
            continues: the pieces continue a text, so that no space is put before them.
        """
        joined: list[Piece] = []
        for kind, group in itertools.groupby(pieces, type):
            joined += ["".join(group)] if kind is str else group
        return self._codec.encode(joined, continues)

    def split_special(self, text: str, before: str = "") -> list[Piece]:
        """The text, which continues `before`, in pieces: names of control tokens as ids, the rest
        unchanged."""
        return self._split(self._special, text, before)

    def split_tags(self, text: str, before: str = "") -> list[Piece]:
        """An assistant's text in pieces: tags as ids, as transformers has them, the rest unchanged.

        A tag is a token that no file marks as special, `<think>`. A model learns to write it, and
        has written it in a chat; a special token comes from no text.
        """
        return self._split(self._tags, text, before)

    def control_names(self, text: str) -> list[str]:
        """The names in a text of special tokens, which no text becomes."""
        found = self._special.findall(text)
        return [name for name in found if self.special_tokens[name] in self.hidden_ids]

    def _split(self, names: re.Pattern, text: str, before: str) -> list[Piece]:
        whole, at, pieces = before + text, len(before), []
        for found in names.finditer(whole):
            if found.start() >= at:
                pieces += [whole[at : found.start()], self.special_tokens[found[0]]]
                at = found.end()
        return [piece for piece in [*pieces, whole[at:]] if piece != ""]

    def decode(
        self, ids: Iterable[int], skip_special: bool = False, after: int | None = None
    ) -> str:
        """The text of token ids.

        Bytes that are not UTF-8 become U+FFFD. The space that sentencepiece puts before a text
        is taken away again, unless the text continues another.

        Args:
            ids: token ids.
            skip_special: leave hidden_ids out, instead of writing their names.
            after: the token before these: the text of one that is not hidden is continued.

        Raises:
            SamplingError: an id is not an integer of the vocabulary.
        """
        stream = self.stream(skip_special, after)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, skip_special: bool = False, after: int | None = None) -> StreamDecoder:
        """A decoder that takes one id at a time; its texts join to `decode` of all ids."""
        continues = self._continues and after is not None and after not in self.hidden_ids
        hidden = self.hidden_ids if skip_special else frozenset()
        return StreamDecoder(self.token_bytes, hidden, self.strips_first_space and not continues)

    @functools.cached_property
    def answers(self) -> "Tokenizer":
        """This tokenizer for answers in a chat: their texts continue no other.

        A chat template may end a prompt with plain text, `[/INST]`.
        """
        view = copy.copy(self)
        view._continues = False
        return view

    def stop_id(self, stop: str) -> int | None:
        """The hidden token that a stop string names; None for a string that may be in a text.

        Raises:
            SamplingError: the name of a hidden token is a part of the string.
        """
        pieces = self.split_special(stop)
        names = [p for p in pieces if p in self.hidden_ids]
        if names and len(pieces) > 1:
            raise SamplingError(
                f"the stop string {stop!r:.80} holds the name of a control token and more, which no "
                "text shows; name the control token alone, or leave it out"
            )
        return names[0] if names else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; U+FFFD's for an id in a gap of the vocabulary.

        Raises:
            SamplingError: the id is not an integer of the vocabulary.
        """
        try:
            index = operator.index(token_id)
        except TypeError:
            index = -1
        if not 0 <= index < self.vocab_size:
            raise SamplingError(
                f"token id {token_id!r:.40}: expected an integer from 0 to {self.vocab_size - 1}"
            )
        return self._codec.token_bytes(index)


def _names_pattern(names: Iterable[str], patterns: Mapping[str, str]) -> re.Pattern:
    """Finds names; where one name starts another, the longer one is meant."""
    longest_first = sorted(names, key=len, reverse=True)
    found = "|".join(patterns.get(name) or re.escape(name) for name in longest_first)
    return re.compile(found or "(?!)")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer, whose kind shows in the content of its file.

    Args:
        path: a tokenizer file, a GGUF file, or a checkpoint folder. In a folder `tokenizer.json`
            is preferred, then `tokenizer.model` (also in `original/`, and beside a folder of
            Meta's), then a single `.gguf` file.

    Raises:
        ArtifactError: there is no tokenizer, it is broken or unsupported, or it names no token
            that ends a text.
    """
    file, folder = locate(path)
    try:
        tokenizer = Tokenizer(_read(file, folder))
        if not tokenizer.stop_ids:
            raise ArtifactError(
                "no end-of-sequence token: neither the tokenizer's files nor "
                "generation_config.json name one"
            )
        if tokenizer.adds_bos and tokenizer.bos_id is None:
            raise ArtifactError("prompts should start with BOS, but no bos_token is named")
    except ArtifactError as e:
        raise e if str(file) in str(e) else ArtifactError(f"{file}: {e}") from e
    return tokenizer


def check_against_model(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ArtifactError if the tokenizer has an id for which the model has no row.

    A pad token without a row, which nothing needs, is left out with a warning.

    JAX silently clamps an index that is out of range, so the id would read another token's row.
    Fewer ids than rows are fine: the other rows are padding.

    Args:
        tokenizer: a tokenizer.
        vocab_size: rows of the model's embedding.
    """
    largest = tokenizer.vocab_size - 1
    while largest >= vocab_size and is_pad(tokenizer.token_bytes(largest).decode(errors="replace")):
        largest -= 1
    if largest < tokenizer.vocab_size - 1:
        tokenizer.pad_id = None if (tokenizer.pad_id or 0) > largest else tokenizer.pad_id
        warnings.warn(
            f"the pad token has the id {largest + 1}, and the model {vocab_size} rows: unused"
        )
    largest = max([largest, *tokenizer.stop_ids])
    if largest >= vocab_size:
        raise ArtifactError(
            f"the tokenizer has ids up to {largest}, the model {vocab_size} rows of embedding; "
            "they do not belong together: pass --tokenizer_path"
        )


def plain_prompt(text: str, tokenizer: Tokenizer, markup: bool = False) -> list[int]:
    """Token ids of a prompt that is no chat's, with BOS where the model has one.

    Args:
        text: the prompt.
        tokenizer: the model's.
        markup: names of control tokens are those tokens; otherwise a warning says that they are not.
    """
    if not markup and (names := tokenizer.control_names(text)):
        warnings.warn(
            f"the prompt holds {names[0]}, which is read as plain text and not as a control token; "
            "--chat writes a conversation, --markup takes the names in a text that you trust",
            stacklevel=2,
        )
    start = tokenizer.encode("", bos=tokenizer.adds_bos)
    ids = tokenizer.encode(text, allow_special=markup)
    return ids if start and ids[:1] == start else start + ids


def check_text(text: str, where: str) -> None:
    """Raises DataError if a text has a lone surrogate, which is not a character."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"{where}: lone surrogate U+{ord(text[e.start]):04X} at character {e.start}"
        ) from e


def decode_utf8(data: bytes, where: str, error: type[AltiplanoError] = DataError) -> str:
    """Strict UTF-8, without a byte order mark.

    Args:
        data: bytes of a file or of stdin.
        where: the name of the input in the error.
        error: the type of the error, which gives the offset of the first wrong byte.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise error(f"{where} is not UTF-8: byte {data[e.start]:#04x} at offset {e.start}") from e


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer file of a checkpoint folder; see load_tokenizer. Raises ArtifactError."""
    names = list_folder(folder)
    for name in ("tokenizer.json", "tokenizer.model"):
        if name in names:
            return folder / name
    elsewhere = [folder / "original"] + [folder.parent] * ("params.json" in names)
    for place in elsewhere:
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    ggufs = [n for n in names if n.endswith(".gguf")]
    if len(ggufs) == 1:
        return folder / ggufs[0]
    raise ArtifactError(
        f"{folder} has no tokenizer.json, no tokenizer.model and {len(ggufs)} .gguf files, "
        "expected one of them; pass --tokenizer_path"
    )


def locate(path: str | Path) -> tuple[Path, Path]:
    """The tokenizer file, and the folder of the files that belong to it."""
    path = Path(path)
    return (find_tokenizer(path), path) if path.is_dir() else (path, path.parent)


def _read(path: Path, folder: Path) -> Vocabulary:
    file = InputFile(path)
    start = bytes(file.read(0, min(file.size, 64)))
    if start.startswith(b"GGUF"):
        return read_gguf(open_gguf(path).metadata)
    if start.startswith(b"version https://git-lfs"):
        raise ArtifactError("this is a Git LFS pointer and not the file; run `git lfs pull`")
    if not 0 < file.size <= _MAX_FILE_BYTES:
        raise ArtifactError(f"{file.size} bytes, expected 1 to {_MAX_FILE_BYTES}")
    data, config = bytes(file.read(0, file.size)), _config(folder)
    if re.match(rb'\s*\{\s*["}]', start):
        config = _companion(folder, "special_tokens_map.json") | config
        return read_tokenizer_json(parse_json(data, str(path), ArtifactError), config)
    if re.match(rb"[A-Za-z0-9+/=]+ ", start):
        return read_tiktoken(data, config)
    if start.startswith(b"\n"):  # field 1 of a protobuf message, of the type "bytes"
        return read_sentencepiece(
            parse_model(data), config, _companion(folder, "added_tokens.json")
        )
    raise ArtifactError(
        f"unknown kind of tokenizer, starts with {start[:16]!r}; expected tokenizer.json, "
        "tiktoken or sentencepiece tokenizer.model, or GGUF"
    )


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with templates and stop ids from the files that override them."""
    config = _companion(folder, CONFIG)
    if os.path.lexists(folder / "chat_template.jinja"):
        file = InputFile(folder / "chat_template.jinja")
        if file.size > _MAX_CONFIG_BYTES:
            raise ArtifactError(f"{file.path} has {file.size} bytes, at most {_MAX_CONFIG_BYTES}")
        source = decode_utf8(bytes(file.read(0, file.size)), str(file.path), ArtifactError)
        config["chat_template"] = source
    elif entry := _companion(folder, "chat_template.json"):
        config["chat_template"] = entry.get("chat_template")
    return config | {"eos_token_id": _listed_stops(folder), "pad_token_id": None}


def _companion(folder: Path, name: str) -> dict[str, Any]:
    if not os.path.lexists(folder / name):  # a link that leads nowhere is an error
        return {}
    return read_json(folder / name, max_bytes=_MAX_CONFIG_BYTES, error=ArtifactError)


def _listed_stops(folder: Path) -> list[int]:
    """The stop ids in generation_config.json, or else in config.json."""
    for name in (GENERATION, "config.json"):
        listed = _companion(folder, name).get("eos_token_id")
        if listed is not None:
            listed = listed if isinstance(listed, list) else [listed]
            if not all(is_int(i) and 0 <= i < 1 << 31 for i in listed):
                raise ArtifactError(f"{name}: eos_token_id {listed!r:.80}, expected token ids")
            return listed
    return []
