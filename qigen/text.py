"""Text in and out of a language model at run time: token ids, text pieces, chat templates.

The Hugging Face ``tokenizers`` library does the encoding. Decoding joins the *pieces* of the
tokens, bytes that are fixed per id, so that a program with nothing but ``vocab.bin`` writes the
same text. How checkpoints become a tokenizer is in :mod:`qigen.frontends.tokenizer`.

``vocab.bin``, little endian: ``char magic[8] = "QIGENVB1"``, ``u32 n``, ``u32 eos_count``,
``i32 eos[eos_count]``, ``u32 offsets[n + 1]``, then the pieces one after the other; piece ``i``
is ``bytes[offsets[i]:offsets[i + 1]]``, empty for control tokens.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import tokenizers

from qigen.errors import BadInput

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
VOCAB_FILE = "vocab.bin"

_MAGIC = b"QIGENVB1"
_HEADER = struct.Struct("<8sII")

Self = TypeVar("Self", bound="Tokenizer")


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads.

    ``pieces`` holds the text of every id as raw bytes. ``eos_ids`` are all ids that end a
    generation, the checkpoint's own end of text first. ``special`` maps the names that chat
    templates use ('bos_token', 'eos_token', ...) to their text. ``prefixes_space`` says that
    encoding puts a space before the text (SentencePiece), which decoding takes away again.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pieces: Sequence[bytes],
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        special: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        prefixes_space: bool = False,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.special = dict(special or {})
        self.chat_template = chat_template
        self.prefixes_space = prefixes_space
        self._pieces = list(pieces)
        self._chat: ChatTemplate | None = None
        # The backend's switch for special tokens is a property of the whole object.
        self._lock = threading.Lock()

    @property
    def vocab_size(self) -> int:
        """Number of token ids: ``0 <= id < vocab_size``."""
        return len(self._pieces)

    @property
    def eos_id(self) -> int | None:
        """The checkpoint's own end of text, if it has one."""
        return self.eos_ids[0] if self.eos_ids else None

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of ``text``.

        ``add_special`` adds what the checkpoint puts around a text (BOS, EOS, [CLS] ...).
        ``parse_special`` lets control tokens that are written out in the text (``<|im_end|>``)
        become their ids; leave it off for text from outside. Raises BadInput for a string that
        is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput(
                f"the text has half of a surrogate pair at character {error.start}; "
                "decode it as UTF-8 first",
                "text",
            ) from None
        with self._lock:
            if self.backend.encode_special_tokens == parse_special:
                self.backend.encode_special_tokens = not parse_special
            with _library_errors("the tokenizer cannot encode the text", "text"):
                ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def piece(self, token: int) -> bytes:
        """Text of a token as raw bytes, perhaps part of a UTF-8 sequence; empty for control tokens.

        Raises BadInput for an id outside the vocabulary.
        """
        if not 0 <= token < len(self._pieces):
            raise BadInput(
                f"token id {token} is outside the vocabulary of {len(self._pieces)} tokens", "text"
            )
        return self._pieces[token]

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        The space that encoding puts before a text is taken away, unless the ids are the
        ``continuation`` of others. Raises BadInput for an id outside the vocabulary.
        """
        stream = self.stream(continuation=continuation)
        return "".join([stream.push(int(token)) for token in ids]) + stream.finish()

    def stream(self, *, continuation: bool = True) -> StreamDecoder:
        """A decoder that takes one id at a time; by default the ids continue a prompt."""
        return StreamDecoder(self, continuation=continuation)

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation by the checkpoint's chat template.

        A message has 'role' and 'content'. Encode the result with ``add_special=False,
        parse_special=True``, since templates write their control tokens out (or call
        :meth:`encode_chat`). Raises BadInput if there is no template or it fails.
        """
        if self.chat_template is None:
            raise BadInput(
                "this model has no chat template; give it a plain prompt instead", "chat template"
            )
        if self._chat is None:
            self._chat = ChatTemplate(self.chat_template)
        return self._chat.render(
            messages, add_generation_prompt=add_generation_prompt, **(self.special | variables)
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation: :meth:`apply_chat`, encoded the way templates need."""
        text = self.apply_chat(messages, add_generation_prompt, **variables)
        return self.encode(text, add_special=False, parse_special=True)

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json``, ``tokenizer_config.json`` and ``vocab.bin``.

        The two JSON files are what the Hugging Face libraries read as well.
        """
        folder = Path(folder)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": self.prefixes_space,
            **self.special,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        with self._lock:
            (folder / TOKENIZER_FILE).write_text(self.backend.to_str(), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(
            json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8"
        )
        (folder / VOCAB_FILE).write_bytes(_pack_vocab(self._pieces, self.eos_ids))

    @classmethod
    def load(cls: type[Self], folder: str | Path) -> Self:
        """The tokenizer that :meth:`save` wrote; BadInput naming the file that is damaged."""
        folder = Path(folder)
        pieces, eos_ids = _unpack_vocab(folder / VOCAB_FILE)
        backend = load_backend(folder / TOKENIZER_FILE)
        config = load_json(folder / CONFIG_FILE)
        where = str(folder / CONFIG_FILE)
        special = special_texts(config, where)
        template = config.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise BadInput("'chat_template' is not a string; compile the model again", where)
        return cls(
            backend,
            pieces,
            bos_id=backend.token_to_id(special["bos_token"]) if "bos_token" in special else None,
            eos_ids=eos_ids,
            special=special,
            chat_template=template,
            prefixes_space=config.get("add_prefix_space") is True,
        )


class StreamDecoder:
    """Text pieces of a growing sequence of ids; a UTF-8 sequence is held back until complete."""

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.prefixes_space and not continuation

    def push(self, token: int) -> str:
        """The text that became complete with ``token``, perhaps empty."""
        piece = self._tokenizer.piece(token)
        if self._strip_space and piece:
            piece = piece.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD if the last UTF-8 sequence never became complete."""
        return self._utf8.decode(b"", final=True)


class ChatTemplate:
    """A Jinja chat template, rendered by the conventions of the Hugging Face libraries.

    Templates come with checkpoints and are not trusted: the sandbox keeps them from everything
    but their variables. Raises BadInput if the template does not parse.
    """

    def __init__(self, source: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BadInput(f"the chat template cannot be read: {error}", "chat template") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Text of the conversation; BadInput if the template refuses it or fails."""
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise BadInput(
                    f"message {index} of the chat is no mapping with a 'role'", "chat template"
                )
        try:
            return self._template.render(messages=[dict(m) for m in messages], **variables)
        except Exception as error:  # a template is a program: it can raise anything
            raise BadInput(
                f"the chat template refused the messages: {error}", "chat template"
            ) from error


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}`` marks the model's words: only a body."""

    tags = {"generation"}  # noqa: RUF012, declared so by the base class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would change the prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """``tokenizer.json`` as the library's object; BadInput naming the file."""
    content = _read(path)
    with _library_errors("this is not a tokenizer that can be read", str(path)):
        return tokenizers.Tokenizer.from_buffer(content)


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; BadInput naming the file."""
    content = _read(path)
    try:
        value = json.loads(content.decode("utf-8"))
        if rb"\u" in content:  # an escape can be half of a surrogate pair, which is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadInput(f"this is not valid JSON: {error}", str(path)) from error
    if not isinstance(value, dict):
        raise BadInput("this JSON file does not hold an object", str(path))
    return value


def special_texts(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """Texts of 'bos_token', 'eos_token' … in a ``tokenizer_config.json``, where it has them.

    An entry is a string or an object with its text in 'content'; anything else is BadInput.
    """
    texts: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"):
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            texts[name] = value
        elif value is not None or config.get(name) is not None:
            raise BadInput(f"'{name}' is neither a string nor an object with 'content'", where)
    return texts


@contextlib.contextmanager
def _library_errors(message: str, where: str) -> Iterator[None]:
    """The ``tokenizers`` library's errors as BadInput; it raises bare Exception, and panics of its
    Rust code come as a BaseException that it does not export.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise BadInput(f"{message}: {error}", where) from error
        raise


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"the file cannot be read ({error.strerror})", str(path)) from error


def _pack_vocab(pieces: Sequence[bytes], eos_ids: Sequence[int]) -> bytes:
    offsets = np.zeros(len(pieces) + 1, np.uint32)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:], dtype=np.uint32)
    return b"".join(
        (
            _HEADER.pack(_MAGIC, len(pieces), len(eos_ids)),
            np.asarray(eos_ids, "<i4").tobytes(),
            offsets.astype("<u4").tobytes(),
            *pieces,
        )
    )


def _unpack_vocab(path: Path) -> tuple[list[bytes], tuple[int, ...]]:
    data = _read(path)
    damaged = BadInput("the vocabulary file is damaged; compile the model again", str(path))
    if len(data) < _HEADER.size:
        raise damaged
    magic, n, eos_count = _HEADER.unpack_from(data)
    start = _HEADER.size + 4 * eos_count
    text = start + 4 * (n + 1)
    if magic != _MAGIC or len(data) < text:
        raise damaged
    eos = np.frombuffer(data, "<i4", eos_count, _HEADER.size)
    offsets = np.frombuffer(data, "<u4", n + 1, start).astype(np.int64)
    if (
        offsets[0] != 0
        or (np.diff(offsets) < 0).any()
        or text + int(offsets[-1]) != len(data)
        or ((eos < 0) | (eos >= n)).any()
    ):
        raise damaged
    ends = (offsets + text).tolist()
    pieces = [data[a:b] for a, b in itertools.pairwise(ends)]
    return pieces, tuple(eos.tolist())
