"""A tokenizer.json in llama.cpp's words: byte-level BPE, and SentencePiece's BPE with a score for each token.

llama.cpp has pre-tokenizers by name; one that splits text as none of them is refused, since the tokens would differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trifold.core.errors import InputError

_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {
    (_BYTE_LEVEL,): "gpt-2",
    (_DIGIT, _BYTE_LEVEL): "smollm",
    (_WORDS % r"\p{N}{1,3}",): "llama-bpe",
    (_WORDS % r"\p{N}",): "qwen2",
    (_CASED,): "tekken",
}
"""Patterns that split the text, one after the other -> name."""
_WHOLE_WORDS = ("llama-bpe", "tekken")  # take a word that is a token without looking at merges
_SPACE = "▁"
_SPECIAL = ("bos", "eos", "unk", "pad")


def write_tokenizer(writer: Any, folder: Path, vocab_size: int, ids: Mapping[str, Any]) -> None:
    """The tokenizer of a folder, or that there is none. writer: a `gguf.GGUFWriter`. vocab_size: rows of the
    embedding. ids: `bos_token_id` and the like, where tokenizer_config.json does not say them. Raises InputError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise InputError(
                f"{folder}: has a tokenizer.model alone; save it as tokenizer.json with transformers first"
            )
        writer.add_tokenizer_model("none")
        return
    try:
        whole, options = json.loads(path.read_text("utf-8")), _json(folder / "tokenizer_config.json")
        kind, pre, scores = _kind(whole)
        prefix, (first, last) = kind == "llama" and _prefixes(whole), _added(whole)
    except InputError as error:
        raise InputError(
            f"{path}: {error}, which llama.cpp does not know; export a copy of the checkpoint without tokenizer.json "
            "for a file that takes token ids"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a tokenizer that is read ({error!r}); copy it again") from error
    tokens, types = _tokens(whole, vocab_size, path)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(prefix)
    else:
        writer.add_token_merges([" ".join(pair) for pair in _merges(whole)])
    known = {token: number for number, token in enumerate(tokens)}
    special = {}
    for name in _SPECIAL:
        said, number = options.get(f"{name}_token"), ids.get(f"{name}_token_id")
        said = said.get("content") if isinstance(said, Mapping) else said
        number = number[0] if isinstance(number, list) and number else number
        found = known.get(said, number) if said else number
        if isinstance(found, int) and 0 <= found < vocab_size:
            special[name] = found
            getattr(writer, f"add_{name}_token_id")(found)
    for name, added in (("bos", first), ("eos", last)):
        if added and [known.get(token) for token in added] != [special.get(name)]:
            raise InputError(f"{path}: adds {' '.join(added)} to every text, which is not its {name}_token; say it is")
        getattr(writer, f"add_add_{name}_token")(bool(added))
    template = folder / "chat_template.jinja"
    chat = template.read_text("utf-8") if template.is_file() else options.get("chat_template")
    if chat:
        writer.add_chat_template(chat)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _kind(whole: Mapping[str, Any]) -> tuple[str, str, dict[str, float]]:
    """Model and pre-tokenizer as llama.cpp calls them, and the scores of SentencePiece's tokens."""
    model = whole["model"]
    if model["type"] != "BPE":
        raise InputError(f"it is a {model['type']} model")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise InputError(f"its BPE has {option}={model[option]!r}")
    if not model["merges"]:
        raise InputError("its BPE has no merges")
    if model.get("byte_fallback"):
        return "llama", "default", _scores(whole)
    patterns = _patterns(whole.get("pre_tokenizer"))
    if patterns not in _PRE:
        raise InputError(f"it splits text by {' then '.join(patterns) or 'nothing'}")
    pre = _PRE[patterns]
    # llama.cpp has no NFC either way; its own converter takes such tokenizers too, and so do their users
    if (whole.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise InputError(f"its text is normalised by {whole['normalizer']['type']}")
    if bool(model.get("ignore_merges")) != (pre in _WHOLE_WORDS):
        raise InputError(f"ignore_merges={bool(model.get('ignore_merges'))} with the pre-tokenizer {pre}")
    return "gpt2", pre, {}


def _patterns(step: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What text is split by."""
    if step is None:
        return ()
    match step["type"]:
        case "Sequence":
            return tuple(pattern for each in step["pretokenizers"] for pattern in _patterns(each))
        case "Split" if step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            return (step["pattern"]["Regex"],)
        case "Digits" if step["individual_digits"]:
            return (_DIGIT,)
        case "ByteLevel" if not step["add_prefix_space"]:
            return (_BYTE_LEVEL,) if step.get("use_regex", True) else ()
    raise InputError(f"it splits text by {step['type']} of {dict(step)}")


def _scores(whole: Mapping[str, Any]) -> dict[str, float]:
    """Of SentencePiece's BPE, which joins the pair that makes the token of the highest score: minus the rank of the
    first merge that makes it. Raises InputError where that is another order than the merges'."""
    vocab, ranks = whole["model"]["vocab"], dict[str, int]()
    made: dict[str, set[tuple[str, str]]] = {}
    previous = ""
    for rank, (left, right) in enumerate(_merges(whole)):
        token = left + right
        if token in ranks and token != previous:
            raise InputError(f"its merges make {token!r} at two different ranks")
        ranks.setdefault(token, rank)
        made.setdefault(token, set()).add((left, right))
        previous = token
    for token in vocab:
        pairs = {(token[:at], token[at:]) for at in range(1, len(token))}
        missing = {pair for pair in pairs if pair[0] in vocab and pair[1] in vocab} - made.get(token, set())
        if token in made and missing:
            raise InputError(f"its merges do not make {token!r} of every pair")
    lowest = -float(len(ranks) + 1)
    added = {token["content"] for token in whole.get("added_tokens", ())}
    return {token: 0.0 if token in added else -float(ranks[token]) if token in ranks else lowest for token in vocab}


def _prefixes(whole: Mapping[str, Any]) -> bool:
    """Whether SentencePiece's text begins with a space of its own. Raises InputError for other changes to it."""
    steps = [whole.get("normalizer"), whole.get("pre_tokenizer")]
    flat = [part for step in steps if step for part in step.get("normalizers", step.get("pretokenizers", [step]))]
    prefix = False
    for step in flat:
        match step["type"]:
            case "Prepend" if step["prepend"] == _SPACE:
                prefix = True
            case "Replace" if step["pattern"] == {"String": " "} and step["content"] == _SPACE:
                pass
            case "Metaspace" if step["replacement"] == _SPACE:
                prefix = prefix or step.get("prepend_scheme", "always") != "never"
            case other:
                raise InputError(f"it changes text by {other}")
    return prefix


def _merges(whole: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of tokens; older files have them in one string."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _tokens(whole: Mapping[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """One for each row of the embedding, with its type; rows that no token has are unused."""
    from gguf import TokenType

    model, sentencepiece = whole["model"], whole["model"].get("byte_fallback")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, number in model["vocab"].items():
        byte = sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        unknown = sentencepiece and token == model.get("unk_token")
        kind = TokenType.BYTE if byte else TokenType.UNKNOWN if unknown else TokenType.NORMAL
        _set(tokens, types, number, token, kind, path)
    for entry in whole.get("added_tokens", ()):
        if sentencepiece and entry["content"] == model.get("unk_token"):
            continue
        kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        _set(tokens, types, entry["id"], entry["content"], kind, path)
    return tokens, types


def _set(tokens: list[str], types: list[int], number: int, token: str, kind: int, path: Path) -> None:
    if not 0 <= number < len(tokens):
        raise InputError(f"{path}: token {token!r} is number {number}, but the embedding has {len(tokens)} rows")
    tokens[number], types[number] = token, int(kind)


def _added(whole: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Special tokens that are put before and behind a text."""
    step = whole.get("post_processor") or {}
    steps = step.get("processors", [step])
    template = next((each["single"] for each in steps if each.get("type") == "TemplateProcessing"), None)
    if template is None:
        return [], []
    at = next(number for number, part in enumerate(template) if "Sequence" in part)
    names = [part.get("SpecialToken", {}).get("id") for part in template]
    return names[:at], names[at + 1 :]
