"""Tokenizer files for the tests, texts that tokenizers disagree on, and llama.cpp as an oracle."""

import functools
import io
import json
import random
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import llama_models
import numpy as np
import sentencepiece
import tokenizers
import xllamacpp
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import TikTokenConverter

from models.llama.formats.gguf import open_gguf
from models.llama.tokenizers.model import LLAMA3_SPECIAL

ROOT = Path(__file__).parents[2]
LLAMA3_MODEL = Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"

HOSTILE = [
    "",
    " ",
    "   ",
    "a  12",
    "a   \n\n 12",
    "\n\n\n  x",
    "\r\n\r\n a\r b",
    "\t\t1\t",
    "½ ¼a ⅷ ² ١٢٣٤ Ⅷ",
    "12345678 a1b22c333",
    "$$$100,000.00!! __init__(self)",
    "it's IT'S we'LL don’t",
    "<|im_start|>user<|im_end|> <|eot_id|><|start_header_id|>system",
    "<|eo<|eot_id|>t_id|> <s>[INST] </s> <0x0A> <unk>",
    "e\u0301 é Å \u212b",
    "👨‍👩‍👧‍👦 🏳️‍🌈",
    "漢字かな交じり文",
    "שלום \u202eעולם\u202c مرحبا",
    "\0a\0",
    "\x04\x13b \x1c \x1d\x1e\x1fa",
    "\x85 \x85x \u2028\u2029",
    "\ufeffa \u200bx \u180e",
    "a\u00a0b\u2003\u2003\u3000 c",
    "\U0003f000 \U000e0001 \U0010fffd \ufdd0",
    "ǅ ﬁ İ ß \u0300\u0301a",
    "▁a ▁▁ b▁",
]
_ALPHABET = ["a", "the", "Ω", "é", "e\u0301", "漢", "😀", "\u200d", "\0", "'s", "'LL", "!", "$"]
_ALPHABET += [" ", "  ", "\n", "\t", "\r", "\u00a0", "\u3000", "\x1c", "\x85", "1", "22", "½", "²"]
_ALPHABET += ["_", "-", "<|im_end|>", "<|eot_id|>", "<s>", "\u2028", "\u0378", "\u0903", "▁"]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Short texts over characters on which tokenizers disagree."""
    rng = random.Random(seed)
    return ["".join(rng.choices(_ALPHABET, k=rng.randrange(1, 14))) for _ in range(count)]


@functools.cache
def sentencepiece_model(markup: bool = False) -> bytes:
    """A small model trained with Llama 2's settings; `markup` adds user-defined tags."""
    words = (
        "the cat sat on a mat and said hello to naïve Ωmega 漢字かな עולם user assistant".split()
    )
    rng = random.Random(1)
    lines = [" ".join(rng.choices(words, k=12)) + f" {n}\n  x = {n}" for n in range(300)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        user_defined_symbols=["<|im_end|>", "▁<EOT>", "  "] if markup else [],
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def llama2_json(model: bytes, legacy: bool) -> dict:
    """A tokenizer.json as Hugging Face converts Llama 2's; `legacy` as before Metaspace."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece in vocab:
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        cuts = [(a, b) for a, b in cuts if a in vocab and b in vocab]
        cuts = [] if vocab[piece] < 3 or sp.is_byte(vocab[piece]) else cuts
        merges += sorted(cuts, key=lambda ab: (vocab[ab[0]], vocab[ab[1]]))
    merges.sort(key=lambda ab: -sp.get_score(vocab[ab[0] + ab[1]]))
    model = tokenizers.models.BPE(
        vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tok = tokenizers.Tokenizer(model)
    if legacy:
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return json.loads(tok.to_str())


@functools.cache
def llama3_json() -> str:
    """The tokenizer.json of Llama 3, converted from Meta's file."""
    converter = TikTokenConverter(str(LLAMA3_MODEL), extra_special_tokens=list(LLAMA3_SPECIAL))
    tok = converter.converted()
    bos = "<|begin_of_text|>"
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 128000)]
    )
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tok.to_str()


def smollm_json(metadata: dict) -> dict:
    """The tokenizer.json of SmolLM2, from its GGUF file's metadata."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:17]])
    return json.loads(tok.to_str())


def tokenizer_metadata(path: Path) -> dict:
    """The keys of a GGUF file that describe its tokenizer."""
    return {k: v for k, v in open_gguf(path).metadata.items() if k.startswith("tokenizer.")}


def sentencepiece_metadata(model: bytes) -> dict:
    """The same keys, for a sentencepiece model."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(sp.vocab_size())
    kinds = [(sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((k for f, k in kinds if f(i)), 1) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_tokenizer_gguf(path: Path, metadata: dict) -> Path:
    """A GGUF file that llama.cpp loads: this tokenizer, and one layer of zeros."""
    dim = 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(dim)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim)
    adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    for key, value in metadata.items():
        adders.get(type(value), writer.add_array)(key, value)
    shapes = {"token_embd": (len(metadata["tokenizer.ggml.tokens"]), dim), "output_norm": (dim,)}
    shapes |= {f"blk.0.{n}_norm": (dim,) for n in ("attn", "ffn")}
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{n}": (dim, dim) for n in square}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """llama.cpp's server in this process, asked for token ids."""

    def __init__(self, path: Path, verbosity: int = 0):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.warmup, params.cpuparams.n_threads = 256, False, 1
        params.verbosity, self._path = verbosity, path
        self._server = xllamacpp.Server(params)

    def stop_ids(self) -> set[int]:
        """The ids that end a text, as a server of the same file says them in its log.

        In a process of its own: with two servers in one, llama.cpp's logger has been seen to lock up.
        """
        code = "import sys, time; from tests.oracles.tokenizer_files import LlamaCpp; "
        code += (
            "LlamaCpp(sys.argv[1], verbosity=5).encode('a'); time.sleep(1)"  # a thread writes it
        )
        command = [sys.executable, "-c", code, str(self._path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
        assert b"max token length" in done.stderr
        return set(map(int, re.findall(rb"EOG token += +([0-9]+) ", done.stderr)))

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self._ask("tokenize", content=text, add_special=False, parse_special=parse_special)

    def complete(self, ids: list[int], count: int) -> list[int]:
        """The likeliest tokens after a prompt."""
        options = dict(temperature=0, ignore_eos=True, return_tokens=True, cache_prompt=False)
        return self._ask("completion", prompt=ids, n_predict=count, **options)

    def _ask(self, what: str, **body: Any) -> list[int]:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{what}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]
