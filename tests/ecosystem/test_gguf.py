"""GGUF: blocks written by hand; names, orders and settings of llama.cpp; its tokenizers."""

import json
import math

import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from trifold.core.canonical import Dense, LowRank, Quantized, RoundedInput
from trifold.core.errors import InputError
from trifold.core.inputs import InputScheme
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.ecosystem.gguf import architecture as facts
from trifold.ecosystem.gguf.blocks import BLOCKS, block_for, refusal
from trifold.ecosystem.gguf.tokenizer import write_tokenizer
from trifold.ecosystem.regrid import misfit, regrid

BY_NAME = {block.name: block for block in BLOCKS}


def weight(codes, scale, zero=None, bits=4, group=32, dtype="float16"):
    codes = torch.tensor(codes, dtype=torch.uint8)
    scale = torch.tensor(scale).to(SCALE_DTYPES[dtype])
    zero = None if zero is None else torch.tensor(zero, dtype=torch.uint8)
    return Quantized(codes, scale, zero, Scheme(bits, group, zero is None, dtype))


def random_weight(bits, symmetric, group=32, dtype="float16", rows=6, columns=192, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme(bits, group, symmetric, dtype)
    shape = scheme.scale_shape(rows, columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (0.01 + torch.rand(shape, generator=generator)).to(SCALE_DTYPES[dtype])
    zero = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    return Quantized(codes, scale, None if symmetric else zero, scheme)


HALF, MINUS_6 = [0x00, 0x38], [0x00, 0xC6]  # 0.5 and -6 as float16, little-endian
RISING = [*range(16), *range(15, -1, -1)]  # byte j: code j, and code j + 16 = 15 - j above it
NIBBLES = [j | (15 - j) << 4 for j in range(16)]


def test_q4_0_by_hand():
    data = BY_NAME["Q4_0"].encode(weight([RISING], [[0.5]]))
    assert data.tolist() == [HALF + NIBBLES]


def test_q4_0_of_fewer_bits_by_hand():
    """Codes 0 to 3 around 2 are 6 to 9 around 8."""
    data = BY_NAME["Q4_0"].encode(weight([[0, 1, 2, 3] * 8], [[0.5]], bits=2))
    assert data.tolist() == [HALF + [0x66, 0x77, 0x88, 0x99] * 4]


def test_q4_1_by_hand():
    """The zero-point 12 and the scale 0.5 make the minimum -6."""
    data = BY_NAME["Q4_1"].encode(weight([RISING], [[0.5]], [[12]]))
    assert data.tolist() == [HALF + MINUS_6 + NIBBLES]


def test_q5_0_by_hand():
    """5 bits around 16: codes 0 to 31, of which 16 to 31 have the fifth bit."""
    data = BY_NAME["Q5_0"].encode(weight([list(range(32))], [[0.5]], bits=5))
    assert data.tolist() == [HALF + [0x00, 0x00, 0xFF, 0xFF] + [j | j << 4 for j in range(16)]]
    one = [[0] * 9 + [16] + [0] * 22]  # bit 9: bit 1 of the second byte
    assert BY_NAME["Q5_0"].encode(weight(one, [[0.5]], bits=5)).tolist() == [HALF + [0, 2, 0, 0] + [0] * 16]


def test_q5_0_of_4_bits_with_a_zero_point_by_hand():
    """Code 15 less 3 is 12, stored as 28: fifth bit and 12."""
    data = BY_NAME["Q5_0"].encode(weight([[15] * 32], [[0.5]], [[3]]))
    assert data.tolist() == [HALF + [0xFF] * 4 + [0xCC] * 16]


def test_q5_1_by_hand():
    data = BY_NAME["Q5_1"].encode(weight([list(range(32))], [[0.5]], [[12]], bits=5))
    assert data.tolist() == [HALF + MINUS_6 + [0x00, 0x00, 0xFF, 0xFF] + [j | j << 4 for j in range(16)]]


def test_q8_0_by_hand():
    codes = [0, 1, 127, 128, 129, 255, *[128] * 26]  # signed: -128 -127 -1 0 1 127
    data = BY_NAME["Q8_0"].encode(weight([codes], [[0.5]], bits=8))
    assert data.tolist() == [HALF + [0x80, 0x81, 0xFF, 0x00, 0x01, 0x7F] + [0] * 26]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 96, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_block_that_takes_a_weight_is_read_by_gguf_as_that_weight(bits, symmetric, group, dtype):
    found = random_weight(bits, symmetric, group, dtype)
    taking = [block for block in BLOCKS if block.refusal(found) is None]
    assert taking or (bits == 8 and not symmetric)
    for block in taking:
        data = block.encode(found)
        assert data.shape == (6, 192 // 32 * block.nbytes)
        values = dequantize(data.numpy(), GGMLQuantizationType[block.name])
        assert torch.equal(torch.from_numpy(values), found.dequantize()), block


@pytest.mark.parametrize(
    ("bits", "symmetric", "smallest"),
    [(2, True, "Q4_0"), (3, True, "Q4_0"), (4, True, "Q4_0"), (2, False, "Q4_0"), (3, False, "Q4_0"),
     (4, False, "Q5_0"), (5, True, "Q5_0"), (5, False, "Q8_0"), (6, True, "Q8_0"), (7, False, "Q8_0"),
     (8, True, "Q8_0")],
)  # fmt: skip
def test_the_smallest_block_is_chosen(bits, symmetric, smallest):
    assert block_for([random_weight(bits, symmetric)]).name == smallest
    # of several one that holds all
    assert block_for([random_weight(bits, symmetric), random_weight(8, True)]).name == "Q8_0"


def test_4_bits_with_a_zero_point_are_q4_1_where_the_minimum_is_a_float16():
    """1.5 has two significant bits, 1 + 2**-10 all eleven: only with a power of two is the product exact."""
    assert block_for([weight([RISING], [[1.5]], [[13]])]).name == "Q4_1"
    assert block_for([weight([RISING], [[1 + 2.0**-10]], [[4]])]).name == "Q4_1"
    assert block_for([weight([RISING], [[1 + 2.0**-10]], [[13]])]).name == "Q5_0"


REFUSED = [
    (random_weight(4, True, columns=80, group=16), "its 80 inputs are not whole blocks of 32"),
    (random_weight(4, True, group=16), "groups of 16 inputs are not whole blocks of 32"),
    (random_weight(4, True, dtype="float32"), "float32 scales would be rounded to float16"),
    (random_weight(8, False), r"its codes less their zero-points, -25\d..25\d, are not within -128..127"),
    (Quantized(torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 1), None, Scheme(4, 32, True, "float32", "nf4")),
     "its values are those of nf4"),
    (RoundedInput(random_weight(8, True), InputScheme()), r"it rounds activations \(a8\)"),
    (LowRank(torch.ones(4, 2), torch.ones(2, 32)), "not rounded to one grid"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_no_block_holds_is_refused(found, reason):
    with pytest.raises(InputError, match=reason):
        raise InputError(refusal(found))


def test_scales_that_float16_cannot_hold_are_refused():
    """Of bfloat16 8 significant bits; float16 has steps of 2**-24 at the bottom."""
    small = weight([RISING], [[(1 + 2.0**-7) * 2.0**-17]], dtype="bfloat16")
    assert refusal(small) is None
    assert "rounded to float16" in refusal(weight([RISING], [[(1 + 2.0**-7) * 2.0**-18]], dtype="bfloat16"))
    assert "rounded to float16" in refusal(weight([RISING], [[2.0**17]], dtype="bfloat16"))


def test_regrid_moves_codes_and_repeats_scales():
    found = weight([[0, 3, 7, 1]], [[0.5, 2.0]], [[3, 0]], bits=3, group=2)
    wider = regrid(found, Scheme(5, 1, True, "float32"))
    assert wider.codes.tolist() == [[13, 16, 23, 17]] and wider.scale.tolist() == [[0.5, 0.5, 2.0, 2.0]]
    assert torch.equal(wider.dequantize(), found.dequantize())
    kept = regrid(found, Scheme(4, 2, False, "float16"))
    assert torch.equal(kept.codes, found.codes) and torch.equal(kept.zero_point, found.zero_point)
    assert "-3..7, are not within -4..3" in misfit(found, Scheme(3, 2, True))
    assert "its codes have 3 bits, not 2" in misfit(found, Scheme(2, 2, False))
    assert "groups of 2 inputs cannot be cut into groups of 4" in misfit(found, Scheme(4, 4, False))


LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
    "head_dim": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def test_the_order_of_query_and_key_rows():
    """Two heads of six: the halves 0 1 2 and 3 4 5 are laid one into the other."""
    kind = facts.architecture(LLAMA)
    order = facts.row_order("model.layers.0.self_attn.q_proj.weight", LLAMA, kind)
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert facts.row_order("model.layers.0.self_attn.k_proj.bias", LLAMA, kind).tolist() == [0, 3, 1, 4, 2, 5]
    assert facts.row_order("model.layers.0.self_attn.v_proj.weight", LLAMA, kind) is None
    qwen = {**LLAMA, "model_type": "qwen3"}
    assert facts.row_order("model.layers.0.self_attn.q_proj.weight", qwen, facts.architecture(qwen)) is None


@pytest.mark.parametrize("group", [32, "channel", "tensor"])
def test_rows_move_with_their_scales(group):
    found, order = random_weight(4, False, group), torch.tensor([5, 0, 3, 1, 4, 2])
    assert torch.equal(facts.reordered(found, order).dequantize(), found.dequantize()[order])
    assert facts.reordered(found, None) is found
    dense = Dense(found.dequantize())
    assert torch.equal(facts.reordered(dense, order).dequantize(), found.dequantize()[order])


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("model.embed_tokens.weight", "llama", "token_embd.weight"),
        ("model.layers.1.self_attn.o_proj.bias", "llama", "blk.1.attn_output.bias"),
        ("model.layers.1.self_attn.q_norm.weight", "qwen3", "blk.1.attn_q_norm.weight"),
        ("model.layers.0.mlp.experts.gate_proj.weight", "mixtral", "blk.0.ffn_gate_exps.weight"),
        ("model.layers.0.mlp.gate.weight", "mixtral", "blk.0.ffn_gate_inp.weight"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "qwen2_moe", "blk.0.ffn_up_shexp.weight"),
    ],
)
def test_names_of_tensors(name, family, expected):
    assert facts.tensor_name(name, LLAMA, facts.ARCHITECTURES[family]) == expected


def test_tensors_that_llama_cpp_has_no_name_for():
    for name, family in [("model.layers.0.self_attn.q_norm.weight", "llama"), ("model.layers.0.odd.weight", "qwen3"),
                         ("model.layers.0.self_attn.o_proj.bias", "qwen3")]:  # fmt: skip
        with pytest.raises(InputError, match=rf"{name}: llama.cpp's {family} has no such tensor"):
            facts.tensor_name(name, LLAMA, facts.ARCHITECTURES[family])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma"}, "gemma is not exported to gguf; known: llama, mistral, mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window=16"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding_window=8"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"model_type": "qwen3", "rope_parameters": {"rope_type": "llama3"}}, "rope_type='llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}}, "attention_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "qwen2"}, "2 heads of 6 with hidden_size=16"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 2}, "dense layers between"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused(changes, reason):
    with pytest.raises(InputError, match=reason):
        facts.architecture({**LLAMA, **changes})


def test_a_window_as_wide_as_the_context_changes_nothing():
    assert facts.architecture({**LLAMA, "model_type": "mistral", "sliding_window": 64}).name == "llama"


def read_back(tmp_path, fill, name="llama"):
    """Keys and values of a file that `fill(writer)` wrote."""
    path = tmp_path / "some.gguf"
    writer = GGUFWriter(path, name)
    fill(writer)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def test_settings(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
    config = {**LLAMA, "rope_parameters": {**rope, "beta_fast": 16.0}, "num_local_experts": 4, "num_experts_per_tok": 2}
    found = read_back(tmp_path, lambda writer: facts.write_settings(writer, config, facts.architecture(config)))
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 6,
        "llama.attention.value_length": 6,
        "llama.vocab_size": 300,
        "llama.rope.dimension_count": 6,
        "llama.rope.freq_base": 1e6,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
    }
    assert {key: found[key] for key in expected} == expected
    assert math.isclose(found["llama.attention.layer_norm_rms_epsilon"], 1e-6, rel_tol=1e-6)


def test_the_factors_of_llama_3_by_hand():
    """Wavelengths of 2 pi and 2 pi 100: short ones stay, long ones are stretched, between them it goes smoothly."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {**LLAMA, "head_dim": 4, "rope_parameters": {**rope, "original_max_position_embeddings": 32}}
    assert facts.rope_factors(config).tolist() == [1.0, 8.0]
    between = {**config, "rope_parameters": {**rope, "original_max_position_embeddings": 400 * math.pi}}
    assert facts.rope_factors(between)[1].item() == pytest.approx(1 / ((2 / 3) / 8 + 1 / 3))  # 2 of 1 to 4
    assert facts.rope_factors(LLAMA) is None


def byte_level(pre=None, merges=(("a", "b"), ("ab", "c")), **options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet, "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), **options))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def described(tmp_path, tokenizer, options=None, ids=None, size=264):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options or {}))
    found = read_back(tmp_path, lambda writer: write_tokenizer(writer, tmp_path, size, ids or {}))
    return {key.removeprefix("tokenizer."): value for key, value in found.items() if key.startswith("tokenizer.")}


def test_byte_level_bpe(tmp_path):
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    options = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}
    found = described(tmp_path, tokenizer, options, {"eos_token_id": [7, 8], "pad_token_id": 3})
    assert (found["ggml.model"], found["ggml.pre"], found["chat_template"]) == ("gpt2", "gpt-2", "{{ messages }}")
    assert found["ggml.tokens"][:2] == ["<s>", "</s>"]
    assert found["ggml.tokens"][258:] == ["ab", "abc", "<tool>", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert found["ggml.merges"] == ["a b", "ab c"]
    normal, control, user, unused = (int(TokenType[name]) for name in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"))
    assert found["ggml.token_type"] == [control] * 2 + [normal] * 258 + [user] + [unused] * 3
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"], found["ggml.padding_token_id"]) == (0, 1, 3)
    assert found["ggml.add_bos_token"] is True and found["ggml.add_eos_token"] is False


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    from tokenizers import Regex

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])


def digits():
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])


@pytest.mark.parametrize(
    ("pre", "options", "name"),
    [
        (digits, {}, "smollm"),
        (lambda: split(WORDS % r"\p{N}"), {}, "qwen2"),
        (lambda: split(WORDS % r"\p{N}{1,3}"), {"ignore_merges": True}, "llama-bpe"),
    ],
    ids=["smollm", "qwen2", "llama-bpe"],
)
def test_pre_tokenizers_by_name(tmp_path, pre, options, name):
    assert described(tmp_path, byte_level(pre(), **options))["ggml.pre"] == name


def sentencepiece(merges=(("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "ab"))):
    tokens = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "▁ab", "ab"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def test_sentencepiece(tmp_path):
    """Every merge of a token next to each other: its score is minus their rank."""
    tokenizer = sentencepiece([("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")])
    found = described(tmp_path, tokenizer, {"unk_token": "<unk>", "bos_token": "<s>"}, size=265)
    assert (found["ggml.model"], found["ggml.pre"], found["ggml.add_space_prefix"]) == ("llama", "default", True)
    scores = dict(zip(found["ggml.tokens"], found["ggml.scores"], strict=True))
    assert [scores[token] for token in ("▁a", "ab", "▁ab")] == [0.0, -1.0, -2.0]
    assert scores["a"] < -2 and "ggml.merges" not in found
    types = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    expected = {"<unk>": "UNKNOWN", "<s>": "CONTROL", "<0x0A>": "BYTE", "a": "NORMAL", "[PAD264]": "UNUSED"}
    assert {token: TokenType(types[token]).name for token in expected} == expected
    assert found["ggml.unknown_token_id"] == 0 and found["ggml.bos_token_id"] == 1


def two_ends():
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(single="<tool> $A", special_tokens=[("<tool>", 260)])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "it is a WordLevel model"),
        (lambda: byte_level(split(r"\s+")), r"it splits text by \\s\+, which llama.cpp does not know; export a copy"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "it splits text by ByteLevel"),
        (lambda: byte_level(ignore_merges=True), "ignore_merges=True with the pre-tokenizer gpt-2"),
        (lambda: byte_level(dropout=0.1), "its BPE has dropout=0.1"),
        (lambda: byte_level(merges=()), "its BPE has no merges"),
        (lambda: sentencepiece([("▁", "a"), ("▁a", "b")]), "do not make '▁ab' of every pair"),
        (sentencepiece, "its merges make '▁ab' at two different ranks"),
        (two_ends, "adds <tool> to every text, which is not its bos_token"),
    ],
)
def test_tokenizers_that_llama_cpp_has_not_are_refused(tmp_path, tokenizer, reason):
    with pytest.raises(InputError, match=reason):
        described(tmp_path, tokenizer(), {"bos_token": "<s>"})


def test_a_token_without_a_row(tmp_path):
    with pytest.raises(InputError, match="token 'abc' is number 259, but the embedding has 259 rows"):
        described(tmp_path, byte_level(), size=259)


def test_a_folder_without_tokenizer(tmp_path):
    found = read_back(tmp_path, lambda writer: write_tokenizer(writer, tmp_path, 8, {}))
    assert found["tokenizer.ggml.model"] == "none" and "tokenizer.ggml.tokens" not in found
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(InputError, match=r"has a tokenizer\.model alone"):
        read_back(tmp_path, lambda writer: write_tokenizer(writer, tmp_path, 8, {}))


def test_every_architecture_is_one_of_ggufs():
    import gguf

    names = {gguf.MODEL_ARCH_NAMES[arch] for arch in MODEL_ARCH}
    assert {kind.name for kind in facts.ARCHITECTURES.values()} <= names
