"""Tokenizers and chat templates from checkpoints: GGUF metadata or a Hugging Face folder.

GGUF stores a vocabulary and the name of an algorithm; here both become one object of the Hugging
Face ``tokenizers`` library. Sources: the GGUF specification (``tokenizer.ggml.*``), the
``tokenizer.json`` of the models that the pre-tokenizers are named after, SentencePiece (which
pieces merge), and llama.cpp, whose published vectors are the test.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from qigen import text
from qigen.errors import BadInput, Unsupported
from qigen.frontends.settings import Settings

_MODEL = "tokenizer.ggml.model"
_PRE = "tokenizer.ggml.pre"
_TOKENS = "tokenizer.ggml.tokens"
_SCORES = "tokenizer.ggml.scores"
_TYPES = "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"
_ADD_BOS = "tokenizer.ggml.add_bos_token"
_ADD_EOS = "tokenizer.ggml.add_eos_token"
_CHAT = "tokenizer.chat_template"
_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # the specification's spelling
    "pad": "tokenizer.ggml.padding_token_id",
    "cls": "tokenizer.ggml.cls_token_id",
}

_MOST_TOKENS = 1 << 24  # far above any vocabulary: a damaged number must not fill the memory
_SPACE = "\u2581"  # SentencePiece writes a space as this character

END_OF_TURN = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "[EOT]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
"""Control tokens that end a generation whatever the metadata says: chat models end a turn with
another token than a text, and many files name only one of the two."""

T = TypeVar("T")
Self = TypeVar("Self", bound="Tokenizer")


class Tokenizer(text.Tokenizer):
    """A tokenizer that can be built from a checkpoint."""

    @classmethod
    def from_gguf(cls: type[Self], metadata: Mapping[str, Any], where: str = "") -> Self:
        """From GGUF metadata: keys to Python values, arrays as lists or numpy arrays.

        ``where`` names the file in errors. Raises BadInput naming the key that is missing,
        damaged or contradicts another, Unsupported for an unknown tokenizer model or
        pre-tokenizer.
        """
        vocab = _read_vocab(Settings(metadata, where))
        built = _GGUF_MODELS[vocab.model](vocab)
        return cls(
            built.backend,
            [
                built.piece(token, kind)
                for token, kind in zip(vocab.tokens, vocab.types, strict=True)
            ],
            bos_id=vocab.ids.get("bos"),
            eos_ids=vocab.eos_ids,
            special={
                f"{name}_token": built.names[vocab.ids[name]]
                for name in ("bos", "eos", "unk", "pad", "sep", "cls")
                if name in vocab.ids
            },
            chat_template=vocab.settings.text(_CHAT) if _CHAT in vocab.settings else None,
            prefixes_space=built.prefixes_space,
        )

    @classmethod
    def from_huggingface(cls: type[Self], folder: str | Path) -> Self:
        """From a folder with ``tokenizer.json`` and, where there are, ``tokenizer_config.json``,
        ``chat_template.jinja``, ``generation_config.json`` and ``config.json``.

        If ``config.json`` says that the model has more token ids than the tokenizer knows (padded
        embeddings), those have empty pieces. Raises BadInput naming the damaged file, Unsupported
        if there is no ``tokenizer.json`` or its decoder is of an unknown kind.
        """
        return _from_huggingface(cls, Path(folder))


class _Type(IntEnum):
    """``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Vocab:
    """The checked vocabulary of a GGUF file. ``ids`` holds the special ids that are named."""

    settings: Settings
    model: str
    tokens: list[str]
    types: list[_Type]
    ids: dict[str, int]
    eos_ids: tuple[int, ...]

    def flag(self, key: str, default: bool) -> bool:
        return self.settings.flag(key, default)

    def bad(self, key: str, message: str) -> BadInput:
        return BadInput(f"'{key}' {message}", self.settings.where)

    def need(self, name: str) -> int:
        """A special id without which the tokenizer cannot work."""
        if name not in self.ids:
            raise self.bad(_ID_KEYS[name], "is missing, but the tokenizer needs it")
        return self.ids[name]


@dataclass(frozen=True)
class _Built:
    """``names`` are the tokens' texts as ``backend`` knows them."""

    backend: tokenizers.Tokenizer
    names: list[str]
    piece: Callable[[str, _Type], bytes]
    prefixes_space: bool = False


def _array(settings: Settings, key: str, kind: str, convert: Callable[[Any], T]) -> list[T]:
    """A list or numpy array with every element converted; BadInput naming the key."""
    if key not in settings:
        raise BadInput(f"the setting '{key}' is missing", settings.where)
    value = settings.values[key]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise settings.bad(key, f"a list of {kind}")
    try:
        return [convert(item) for item in value]
    except (TypeError, ValueError) as error:
        raise BadInput(f"'{key}' is not a list of {kind}", settings.where) from error


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode("utf-8")  # UnicodeEncodeError, a ValueError, if it is half a surrogate pair
    return value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _token_type(value: Any) -> _Type:
    return _Type(operator.index(value))


def _read_vocab(settings: Settings) -> _Vocab:
    """Checks what all tokenizer models share."""
    model = settings.text(_MODEL)
    if model not in _GGUF_MODELS:
        raise _unknown("tokenizer model", model, _GGUF_MODELS, settings.where)
    tokens = _array(settings, _TOKENS, "strings", _string)
    types = _array(settings, _TYPES, "token types 0 to 6", _token_type)
    if not tokens:
        raise BadInput(f"'{_TOKENS}' is empty", settings.where)
    if len(types) != len(tokens):
        raise BadInput(
            f"'{_TYPES}' has {len(types)} entries for the {len(tokens)} tokens of '{_TOKENS}'",
            settings.where,
        )
    # An empty string can be no key of a vocabulary, and several would be the same key.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            raise BadInput(
                f"'{_TOKENS}' has the token {token!r} twice: {first[token]} and {i}",
                settings.where,
            )
    ids = {}
    for name, key in _ID_KEYS.items():
        token_id = settings.token(key, len(tokens))
        if token_id is not None:
            ids[name] = token_id
    ends = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    named = (_Type.CONTROL, _Type.USER_DEFINED)
    turns = sorted(
        first[token] for token in END_OF_TURN & first.keys() if types[first[token]] in named
    )
    # Whatever ends a text must not be printed nor be written by the user, even if the file calls
    # it a normal token.
    for token_id in (*ends, *turns, *([ids["bos"]] if "bos" in ids else [])):
        types[token_id] = _Type.CONTROL
    return _Vocab(settings, model, tokens, types, ids, tuple(dict.fromkeys((*ends, *turns))))


def _unknown(what: str, name: str, known: Collection[str], where: str) -> Unsupported:
    return Unsupported(
        f"the {what} '{name}' is not known; the known ones are {', '.join(sorted(known))}", where
    )


# Byte-level BPE --------------------------------------------------------------------------------

_DIGIT = r"\p{N}"
_THREE_DIGITS = r"\p{N}{1,3}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_QWEN2 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_SEED = rf"{_SUFFIXES}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"
# A word in camel case is cut before its capitals.
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LOW_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
_HIGH_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
_TEKKEN = rf"{_LOW_WORD}|{_HIGH_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
_GPT4O = (
    rf"{_LOW_WORD}{_SUFFIXES}?|{_HIGH_WORD}{_SUFFIXES}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + rf"|{_LINES}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE cuts text into words: ``splits`` one after the other, each keeping what
    it matches and what lies between. ``ignore_merges``: a word that is a token is not cut up.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False  # where the file does not say


def _table(*rows: tuple[str, PreTokenizer]) -> dict[str, PreTokenizer]:
    return {name: row for names, row in rows for name in names.split()}


PRE_TOKENIZERS: dict[str, PreTokenizer] = _table(
    # llama.cpp's own, for files from before models were told apart
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    ("gpt-2 phi-2 a.x-4.0 exaone4 gigachat granite-docling trillion", PreTokenizer((_GPT2,))),
    ("smollm starcoder refact codeshell minerva-7b", PreTokenizer((_DIGIT, _GPT2))),
    (
        "llama-bpe llama3 llama-v3 falcon3 midm-2.0 pixtral",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe", PreTokenizer((_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen kormo megrez", PreTokenizer((_QWEN2,), nfc=True)),
    ("stablelm2 hunyuan", PreTokenizer((_QWEN2,))),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4", PreTokenizer((_GPT4O,))),
    ("seed-coder", PreTokenizer((_SEED,))),
    (
        "deepseek-coder",
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT)),
    ),
    ("deepseek-v3", PreTokenizer((_THREE_DIGITS, "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_V3))),
)
"""Pre-tokenizers by ``tokenizer.ggml.pre``, from the ``tokenizer.json`` of the models."""


def _byte_level_bpe(vocab: _Vocab) -> _Built:
    """``tokenizer.ggml.model`` 'gpt2': merges over the 256 bytes, written as letters."""
    settings = vocab.settings
    name = settings.text(_PRE)
    if name not in PRE_TOKENIZERS:
        raise _unknown("pre-tokenizer", name, PRE_TOKENIZERS, settings.where)
    row = PRE_TOKENIZERS[name]
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    merges = []
    for i, merge in enumerate(_array(settings, _MERGES, "strings", _string)):
        parts = merge.split(" ")
        if len(parts) != 2:
            raise vocab.bad(f"{_MERGES}[{i}]", f"is {merge!r}, expected two tokens and a space")
        for token in (*parts, "".join(parts)):
            if token not in ids:
                raise vocab.bad(f"{_MERGES}[{i}]", f"names {token!r}, which is no token")
        merges.append((parts[0], parts[1]))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, ignore_merges=row.ignore_merges)
    )
    if vocab.flag("tokenizer.ggml.normalizer.nfc", row.nfc):
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in row.splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, vocab, vocab.tokens)
    _add_bos_eos(backend, vocab, add_bos=row.add_bos)
    return _Built(backend, vocab.tokens, _by_type(_byte_level_piece))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as visible characters."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([_BYTES[char] for char in token])
    except KeyError:  # a token that was added as plain text
        return token.encode("utf-8")


# SentencePiece BPE -----------------------------------------------------------------------------


def _sentencepiece_bpe(vocab: _Vocab) -> _Built:
    """``tokenizer.ggml.model`` 'llama': the pair whose merged piece has the best score merges
    first; characters without a piece become bytes.
    """
    settings = vocab.settings
    scores = _array(settings, _SCORES, "finite numbers", _finite)
    if len(scores) != len(vocab.tokens):
        raise vocab.bad(_SCORES, f"has {len(scores)} entries for {len(vocab.tokens)} tokens")
    unknown = vocab.tokens[vocab.ids["unk"]] if "unk" in vocab.ids else None
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    bytes_missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in ids]
    if bytes_missing and unknown is None:
        raise vocab.bad(
            _TOKENS,
            f"lacks the byte token <0x{bytes_missing[0]:02X}>, and "
            f"'{_ID_KEYS['unk']}' names no token for unknown text",
        )
    for token, kind in zip(vocab.tokens, vocab.types, strict=True):
        if kind is _Type.BYTE and not _BYTE_TOKEN.fullmatch(token):
            raise vocab.bad(_TOKENS, f"has the byte token {token!r}, expected <0x00> to <0xFF>")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_from_scores(vocab, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=not bytes_missing,
        )
    )
    prefix = vocab.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    _add_special(backend, vocab, vocab.tokens, strip_right=_phi3_tokens(vocab))
    _add_bos_eos(backend, vocab, add_bos=True)
    return _Built(backend, vocab.tokens, _by_type(_sentencepiece_piece), prefix)


def _merges_from_scores(vocab: _Vocab, scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best score of the made piece first.

    Only text can be merged: SentencePiece keeps control, byte and user-defined pieces apart, so
    that no text can spell a control token. Pairs that make the same piece are in the order of
    their ids, as in the conversion by the Hugging Face libraries.
    """
    usable = (_Type.NORMAL, _Type.UNUSED)
    pieces = {
        token: i
        for i, (token, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True))
        if kind in usable
    }
    ranked = []
    for token, made in pieces.items():
        for cut in range(1, len(token)):
            left = pieces.get(token[:cut])
            if left is not None:
                right = pieces.get(token[cut:])
                if right is not None:
                    ranked.append((-scores[made], made, left, right))
    ranked.sort()
    return [(vocab.tokens[left], vocab.tokens[right]) for _, _, left, right in ranked]


def _phi3_tokens(vocab: _Vocab) -> frozenset[str]:
    """Tokens that swallow the white space after them: the chat tokens of phi-3.

    Its ``tokenizer_config.json`` says so; GGUF has no place for it, so the vocabulary is known by
    tokens that no other has.
    """
    ids = {
        token
        for token, kind in zip(vocab.tokens, vocab.types, strict=True)
        if kind is _Type.CONTROL
    }
    if not {"<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>"} <= ids:
        return frozenset()
    return frozenset(ids | {"</s>"}) - {"<unk>", "<s>", "<|endoftext|>"}


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _sentencepiece_piece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes.fromhex(match[1])
    return token.replace(_SPACE, " ").encode("utf-8")


# WordPiece -------------------------------------------------------------------------------------


def _wordpiece(vocab: _Vocab) -> _Built:
    """``tokenizer.ggml.model`` 'bert'. GGUF marks the pieces that begin a word, BERT those that
    continue one.
    """
    kept = (_Type.CONTROL, _Type.UNKNOWN)
    names = [
        token
        if kind in kept or (token.startswith("[") and token.endswith("]"))
        else token[len(_SPACE) :]
        if token.startswith(_SPACE)
        else "##" + token
        for token, kind in zip(vocab.tokens, vocab.types, strict=True)
    ]
    ids = {name: i for i, name in enumerate(names)}
    if len(ids) != len(names):
        raise vocab.bad(_TOKENS, "has tokens that are the same word piece")
    first, last = vocab.ids.get("cls", vocab.ids.get("bos")), vocab.need("sep")
    if first is None:
        raise vocab.bad(_ID_KEYS["cls"], "is missing, but the tokenizer needs it")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=ids, unk_token=names[vocab.need("unk")]))
    lowercase = vocab.flag("tokenizer.ggml.normalizer.lowercase", True)
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase,
        strip_accents=vocab.flag("tokenizer.ggml.normalizer.strip_accents", lowercase),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    _add_special(backend, vocab, names)
    backend.post_processor = _frame(names, first, last)
    return _Built(backend, names, _by_type(_wordpiece_piece), prefixes_space=True)


def _wordpiece_piece(token: str) -> bytes:
    return token.replace(_SPACE, " ", 1).encode("utf-8")


_GGUF_MODELS: dict[str, Callable[[_Vocab], _Built]] = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece_bpe,
    "bert": _wordpiece,
}


# What they share -------------------------------------------------------------------------------


def _by_type(normal: Callable[[str], bytes]) -> Callable[[str, _Type], bytes]:
    """Pieces by token type: control tokens have no text, user-defined ones are their text."""

    def piece(token: str, kind: _Type) -> bytes:
        if kind in (_Type.CONTROL, _Type.UNKNOWN, _Type.UNUSED):
            return b""
        return token.encode("utf-8") if kind is _Type.USER_DEFINED else normal(token)

    return piece


def _add_special(
    backend: tokenizers.Tokenizer,
    vocab: _Vocab,
    names: Sequence[str],
    strip_right: Collection[str] = (),
) -> None:
    """Tokens that are found in the text before anything else happens to it.

    User-defined ones always, the others only where special tokens are asked for.
    """
    found = (_Type.CONTROL, _Type.UNKNOWN, _Type.USER_DEFINED)
    for special in (True, False):
        # normalized=False: they are looked for in the text as it was written.
        backend.add_tokens(
            [
                tokenizers.AddedToken(
                    name, special=special, normalized=False, rstrip=name in strip_right
                )
                for name, kind in zip(names, vocab.types, strict=True)
                if kind in found and special is (kind is not _Type.USER_DEFINED)
            ]
        )


def _add_bos_eos(backend: tokenizers.Tokenizer, vocab: _Vocab, *, add_bos: bool) -> None:
    """The frame of a text; ``add_bos`` is what holds where the file does not say."""
    bos = vocab.need("bos") if vocab.flag(_ADD_BOS, add_bos) else None
    eos = vocab.need("eos") if vocab.flag(_ADD_EOS, False) else None
    if bos is not None or eos is not None:
        backend.post_processor = _frame(vocab.tokens, bos, eos)


def _frame(
    names: Sequence[str], first: int | None, last: int | None
) -> processors.TemplateProcessing:
    # The template's own names: a token's text may hold characters that mean something there.
    frame = {"[FIRST]": first, "[LAST]": last}
    used = {name: token for name, token in frame.items() if token is not None}
    single = [name for name in ("[FIRST]", "$A", "[LAST]") if name == "$A" or name in used]
    return processors.TemplateProcessing(
        single=single,
        special_tokens=[
            {"id": name, "ids": [token], "tokens": [names[token]]} for name, token in used.items()
        ],
    )


# Hugging Face folders --------------------------------------------------------------------------


def _from_huggingface(cls: type[Self], folder: Path) -> Self:
    path = folder / text.TOKENIZER_FILE
    if not path.is_file():
        raise Unsupported(
            f"the folder has no {text.TOKENIZER_FILE}; save it again with the model's fast "
            "tokenizer (AutoTokenizer.from_pretrained(...).save_pretrained(...))",
            str(folder),
        )
    backend = text.load_backend(path)
    backend.no_padding()
    backend.no_truncation()
    config_path = folder / text.CONFIG_FILE
    config = _optional_json(config_path)
    _add_missing_tokens(backend, config, str(config_path))
    special = text.special_texts(
        _optional_json(folder / "special_tokens_map.json") | config, str(config_path)
    )
    ids: dict[str, int] = {}
    for name, token in special.items():
        token_id = backend.token_to_id(token)
        if token_id is None:
            raise BadInput(f"'{name}' is {token!r}, which is no token", str(config_path))
        ids[name] = token_id
    kinds = {
        token_id: _Type.CONTROL if added.special else _Type.USER_DEFINED
        for token_id, added in backend.get_added_tokens_decoder().items()
    }
    tokens = {token_id: token for token, token_id in backend.get_vocab().items()}
    if not tokens or max(tokens) >= _MOST_TOKENS:
        raise BadInput("the vocabulary is empty or has an absurd token id", str(path))
    eos_ids = [ids["eos_token"]] if "eos_token" in ids else []
    model_config = _optional_json(folder / "config.json")
    for name in ("generation_config.json", "config.json"):
        eos_ids += _eos_ids(_optional_json(folder / name), str(folder / name))
    eos_ids += sorted(i for i in kinds if tokens[i] in END_OF_TURN)
    size = max(max(tokens) + 1, *_vocab_sizes(model_config, str(folder / "config.json")))
    for token_id in eos_ids:
        if token_id >= size:
            raise BadInput(
                f"'eos_token_id' {token_id} is outside the vocabulary of {size} tokens", str(folder)
            )
        kinds[token_id] = _Type.CONTROL
    normal, prefixes_space = _piece_of_decoder(path)
    piece = _by_type(normal)
    return cls(
        backend,
        [piece(tokens[i], kinds.get(i, _Type.NORMAL)) if i in tokens else b"" for i in range(size)],
        bos_id=ids.get("bos_token"),
        eos_ids=eos_ids,
        special=special,
        chat_template=_chat_template(folder, config),
        prefixes_space=prefixes_space,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return text.load_json(path) if path.is_file() else {}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], where: str
) -> None:
    """Adds tokens that stand only in ``added_tokens_decoder`` of ``tokenizer_config.json``."""
    added = config.get("added_tokens_decoder", {})
    try:
        rows = sorted((int(token_id), row) for token_id, row in added.items())
        for token_id, row in rows:
            token = _string(row["content"])
            if backend.token_to_id(token) is None:
                flags = {
                    name: row[name] is True
                    for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
                    if name in row
                }
                backend.add_tokens([tokenizers.AddedToken(token, **flags)])
            if backend.token_to_id(token) != token_id:
                raise BadInput(
                    f"'added_tokens_decoder' gives {token!r} the id {token_id}, but "
                    f"{text.TOKENIZER_FILE} has {backend.token_to_id(token)}",
                    where,
                )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput("'added_tokens_decoder' is damaged", where) from error


def _eos_ids(config: Mapping[str, Any], where: str) -> list[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in values:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise BadInput(f"'eos_token_id' holds {token_id!r}, expected token ids", where)
    return values


def _vocab_sizes(config: Mapping[str, Any], where: str) -> Iterator[int]:
    """Rows of the embedding, or 0 where ``config.json`` does not say."""
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, Mapping) else {}):
        yield Settings(holder, where).integer("vocab_size", 0, high=_MOST_TOKENS)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput("the chat template cannot be read as UTF-8", str(path)) from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = (row for row in template if isinstance(row, Mapping))
        template = next(
            (row.get("template") for row in named if row.get("name") == "default"), None
        )
    if template is not None and not isinstance(template, str):
        raise BadInput("'chat_template' is not a string", str(folder / text.CONFIG_FILE))
    return template


def _piece_of_decoder(path: Path) -> tuple[Callable[[str], bytes], bool]:
    """How ``tokenizer.json`` writes the text of its tokens, and whether encoding puts a space
    before the text that decoding has to take away.
    """
    steps = list(_decoder_steps(text.load_json(path).get("decoder")))
    kinds = {str(step.get("type")) for step in steps}
    strips = any(
        (step.get("type") == "Strip" and step.get("content") == " " and step.get("start") == 1)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    if "ByteLevel" in kinds:
        return _byte_level_piece, strips
    for step in steps:
        if step.get("type") == "WordPiece":
            return partial(_continuation_piece, str(step.get("prefix", "##"))), True
    if "Metaspace" in kinds or any(step.get("pattern") == {"String": _SPACE} for step in steps):
        return _sentencepiece_piece, strips
    raise Unsupported(
        f"the decoder {', '.join(sorted(kinds)) or 'none'} of the tokenizer is not supported; "
        "byte-level BPE, SentencePiece and WordPiece are",
        str(path),
    )


def _decoder_steps(decoder: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(decoder, Mapping):
        if decoder.get("type") == "Sequence":
            for step in decoder["decoders"]:  # the library has read the file: it is a list
                yield from _decoder_steps(step)
        else:
            yield decoder


def _continuation_piece(prefix: str, token: str) -> bytes:
    """A word piece as BERT writes it: the prefix continues a word, all others begin one."""
    return (token[len(prefix) :] if token.startswith(prefix) else " " + token).encode("utf-8")
