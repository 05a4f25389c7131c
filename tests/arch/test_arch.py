"""arch: dimensions against plain loops, configs that make no sense, and which config a cut model leaves with."""

from __future__ import annotations

import itertools

import numpy as np
import pico
import pytest

from mlx_pare.arch import Keep, LayerKeep, can_keep, cut, describe, positions, supported_types
from mlx_pare.arch.axes import AXES, dim, length, select
from mlx_pare.base.errors import PareError
from mlx_pare.pruning import reach

SIZES = {"hidden": 6, "vocab": 7, "ffn": 5, "kv_head": 3, "group": 2, "head_dim": 4, "expert": 3}
DIMS = [
    "hidden",
    "vocab",
    "ffn + ffn",
    "q_head*head_dim",
    "kv_head*group*head_dim",
    "q_head*head_dim + kv_head*head_dim",
    "q_head*head_dim + kv_head*head_dim + kv_head*head_dim",
    "q_head*head_dim + q_head*head_dim",
    "expert*ffn",
    "expert*ffn + expert*ffn",
]
KEEPS = [
    {},
    {"ffn": [0, 3]},
    {"kv_head": [2]},
    {"kv_head": [0, 2], "head_dim": [1, 3]},
    {"group": [1]},
    {"hidden": [5]},
    {"expert": [1, 2], "ffn": [4]},
    {"vocab": [0, 6]},
]


def primitive(text):
    """The segments of "a*b + c", with q_head spelled out, by string replacement alone."""
    return [s.strip().replace("q_head", "kv_head*group").split("*") for s in text.split("+")]


def labels(text):
    """The entries of a dimension in the order they are stored: one dict axis -> index each."""
    found = []
    for axes in primitive(text):
        ranges = [range(SIZES[a]) for a in axes]
        found += [dict(zip(axes, index, strict=True)) for index in itertools.product(*ranges)]
    return found


@pytest.mark.parametrize("text", DIMS)
def test_length_counts_the_entries(text):
    assert length(dim(text), SIZES) == len(labels(text))


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("text", DIMS)
def test_select_against_labels(text, keep):
    expected = [n for n, label in enumerate(labels(text)) if all(i in keep.get(a, [i]) for a, i in label.items())]
    touched = any(axis in keep for axes in primitive(text) for axis in axes)
    assert select(dim(text), SIZES, keep) == (expected if touched else None)


def test_select_cuts_a_fused_matrix_like_its_parts():
    """Rows of [q ; k] taken at once are the rows of q and of k taken apart."""
    fused = np.arange(length(dim("q_head*head_dim + kv_head*head_dim"), SIZES))
    q, k = np.split(fused, [length(dim("q_head*head_dim"), SIZES)])
    keep = {"kv_head": [0, 2]}
    parts = [q[select(dim("q_head*head_dim"), SIZES, keep)], k[select(dim("kv_head*head_dim"), SIZES, keep)]]
    both = fused[select(dim("q_head*head_dim + kv_head*head_dim"), SIZES, keep)]
    assert both.tolist() == np.concatenate(parts).tolist()


def test_select_keeps_the_order_that_is_asked():
    assert select(dim("kv_head*head_dim"), SIZES, {"kv_head": [2, 0]}) == [8, 9, 10, 11, 0, 1, 2, 3]


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match="'heads' in 'heads\\*head_dim'"):
        dim("heads*head_dim")


def test_nested_axes_are_made_of_primitive_ones():
    for axis in AXES.values():
        assert all(not AXES[f].factors for f in axis.factors)


# ---- describe ----


def test_an_unknown_type_lists_the_supported_ones():
    with pytest.raises(PareError) as caught:
        describe({"model_type": "mamba"})
    assert "'mamba'" in str(caught.value)
    assert all(name in str(caught.value) for name in supported_types())


@pytest.mark.parametrize("model_type", [None, 7, ["llama"]], ids=str)
def test_a_type_that_is_no_name_is_refused(model_type):
    with pytest.raises(PareError, match="not described"):
        describe({"model_type": model_type})


SIZE_KEYS = ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")


@pytest.mark.parametrize("key", SIZE_KEYS)
@pytest.mark.parametrize("absent", ["gone", "null"])
def test_a_missing_key_is_named(key, absent):
    config = pico.config_of("llama", vocab_size=512)
    config |= {key: None}
    if absent == "gone":
        del config[key]
    with pytest.raises(PareError, match=f"lacks {key}"):
        describe(config)


@pytest.mark.parametrize("axis", ["hidden", "ffn", "layer", "vocab"])
def test_a_key_named_like_an_axis_means_nothing(axis):
    config = pico.config_of("llama", vocab_size=512)
    assert describe({**config, axis: 3}).sizes == describe(config).sizes
    with pytest.raises(PareError, match="lacks intermediate_size"):
        describe({**{k: v for k, v in config.items() if k != "intermediate_size"}, axis: 3})


@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True, [64], 2**31, {}], ids=str)
@pytest.mark.parametrize("key", [*SIZE_KEYS, "num_key_value_heads", "head_dim"])
def test_a_nonsense_size_is_named(key, value):
    with pytest.raises(PareError, match=f"{key} = "):
        describe({**pico.config_of("llama", vocab_size=512), key: value})


@pytest.mark.parametrize("value", [0, -6, "6", 2.5, True], ids=str)
def test_a_nonsense_period_is_named(value):
    with pytest.raises(PareError, match="sliding_window_pattern"):
        describe(pico.config_of("gemma3_text", vocab_size=512, sliding_window_pattern=value))


@pytest.mark.parametrize("value", ["full_attention", 3, [["full_attention"]] * 4, [1, 2, 3, 4]], ids=str)
def test_nonsense_layer_types_are_refused(value):
    with pytest.raises(PareError, match=r"layer_types|not described"):
        describe(pico.config_of("llama", vocab_size=512, layer_types=value))


def test_heads_must_divide():
    with pytest.raises(PareError, match="4 query heads cannot share 3 kv heads"):
        describe(pico.config_of("llama", vocab_size=512, num_key_value_heads=3))
    with pytest.raises(PareError, match="64 is no multiple of 3 heads"):
        describe(pico.config_of("llama-untied", vocab_size=512, num_attention_heads=3, num_key_value_heads=3))


def test_heads_that_are_not_given_are_derived():
    config = pico.config_of("llama-untied", vocab_size=512)
    del config["num_key_value_heads"]
    sizes = describe(config).layers[0].sizes
    assert sizes == {"kv_head": 4, "group": 1, "head_dim": 16, "ffn": 128}


def test_layer_types_must_match_the_layers():
    with pytest.raises(PareError, match="3 layer_types for 4 layers"):
        describe(pico.config_of("llama", vocab_size=512, layer_types=["full_attention"] * 3))
    with pytest.raises(PareError, match="'linear_attention'"):
        describe(pico.config_of("llama", vocab_size=512, layer_types=["linear_attention"] * 4))


def test_gemma_kinds_follow_the_period():
    arch = describe(pico.config_of("gemma3_text", vocab_size=512))
    assert [layer.kind for layer in arch.layers] == pico.FAMILIES["gemma3_text"]["layer_types"]
    assert positions(arch, 4) == [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]


@pytest.mark.parametrize("untied", [None, False, True])
def test_the_checkpoint_decides_whether_gemma_is_tied(untied):
    arch = describe(pico.config_of("gemma3_text", vocab_size=512), untied=untied)
    assert arch.tied is not bool(untied)
    assert ("lm_head.weight" in [t.name for t in arch.tensors()]) is bool(untied)


@pytest.mark.parametrize("family", sorted(pico.FAMILIES))
def test_the_table_is_the_model(family):
    """Names and shapes are those of mlx-lm's own class."""
    from mlx.utils import tree_flatten

    config = pico.config_of(family, vocab_size=512)
    model = dict(tree_flatten(pico.build(config).parameters()))
    table = {t.name: t.shape for t in describe(config).tensors()}
    assert table == {name: array.shape for name, array in model.items()}


# ---- cutting ----


def depth(layers, **keep):
    return Keep(tuple(LayerKeep(i, keep) for i in layers))


def test_gemma_survivors_keep_their_kinds():
    arch = describe(pico.config_of("gemma3_text", vocab_size=512))
    for count in range(1, 7):
        for layers in itertools.combinations(range(6), count):
            kinds = [arch.layers[i].kind for i in layers]
            same = all((kind == "full_attention") == ((n + 1) % 3 == 0) for n, kind in enumerate(kinds))
            assert can_keep(arch, layers) is (same and count >= 3)


@pytest.mark.parametrize("layers", [[0, 1, 2], [3, 4, 5], [0, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 4]], ids=str)
def test_cut_accepts_whole_periods(layers):
    arch = describe(pico.config_of("gemma3_text", vocab_size=512))
    smaller = cut(arch, depth(layers))
    assert [layer.kind for layer in smaller.layers] == [arch.layers[i].kind for i in layers]
    assert smaller.config["layer_types"] == [arch.layers[i].kind for i in layers]


@pytest.mark.parametrize("layers", [[0, 1, 3], [0, 2], [0, 1], [2, 3, 4], [1, 2, 3, 4, 5]], ids=str)
def test_cut_refuses_to_change_a_kind(layers):
    with pytest.raises(PareError, match="change the attention kind"):
        cut(describe(pico.config_of("gemma3_text", vocab_size=512)), depth(layers))


MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def test_layer_types_are_sliced():
    arch = describe(pico.config_of("llama", vocab_size=512, layer_types=MIXED, sliding_window=8))
    smaller = cut(arch, depth([1, 2]))
    assert smaller.config["layer_types"] == ["full_attention", "sliding_attention"]
    assert smaller.config["num_hidden_layers"] == 2
    with pytest.raises(PareError, match="attention kind"):  # mlx-lm's llama needs one full-attention layer
        cut(arch, depth([0, 2]))


def test_layer_types_of_a_uniform_family_are_sliced_too():
    arch = describe(pico.config_of("qwen3", vocab_size=512, layer_types=["full_attention"] * 4))
    assert cut(arch, depth([0, 3])).config["layer_types"] == ["full_attention"] * 2


def test_a_list_that_mlx_lm_ignores_must_match_before_it_is_sliced():
    arch = describe(pico.config_of("qwen3", vocab_size=512, layer_types=["full_attention"] * 3))
    with pytest.raises(PareError, match="3 layer_types for 4 layers"):
        cut(arch, depth([0, 1]))


@pytest.mark.parametrize(("family", "why"), [("qwen2", "has no biases"), ("gemma3_text", "has no attn_post_norm")])
def test_widths_that_differ_are_refused_where_no_class_takes_them(family, why):
    arch = describe(pico.config_of(family, vocab_size=512))
    keep = Keep(tuple(LayerKeep(i, {"ffn": range(64 - 32 * (i == 1))}) for i in range(3)))
    with pytest.raises(PareError, match=f"layers differ in ffn \\(32 to 64\\).*openelm {why}"):
        cut(arch, keep)


def left_as(family, keep=None, packed=False, **changes):
    arch = describe(pico.config_of(family, vocab_size=512, **changes))
    return cut(arch, keep or depth([0, 1], kv_head=[0]), packed)


def test_a_cut_that_divides_keeps_its_type():
    smaller = left_as("llama")  # 64 over 2 heads
    assert (smaller.config["model_type"], smaller.config["head_dim"]) == ("llama", 16)
    assert smaller.config["num_attention_heads"] == 2


THREE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
TO_THREE = depth([0, 1], kv_head=[0, 1, 3])  # 6 heads do not divide 64


def test_llama_leaves_as_mistral():
    smaller = left_as("llama", TO_THREE, packed=True, **THREE)
    assert smaller.config["model_type"] == "mistral"
    assert smaller.config["architectures"] == ["MistralForCausalLM"]
    assert smaller.config["sliding_window"] is None and smaller.config["head_dim"] == 8
    assert smaller.tied


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("attention", "mlp"), [(True, False), (False, True), (True, True)])
def test_llama_with_biases_leaves_as_seed_oss(attention, mlp, packed):
    changes = THREE | {"attention_bias": attention, "mlp_bias": mlp}
    smaller = left_as("llama", TO_THREE, packed, **changes)
    assert smaller.config["model_type"] == "seed_oss"
    before = {t.spec.role for t in describe(pico.config_of("llama", vocab_size=512, **changes)).tensors()}
    assert {t.spec.role for t in smaller.tensors()} == before | ({"lm_head"} if packed else set())
    assert smaller.tied is not packed


@pytest.mark.parametrize("packed", [False, True])
def test_qwen2_head_cut_leaves_as_seed_oss(packed):
    smaller = left_as("qwen2", depth([0, 1], kv_head=[0, 1]), packed)
    assert smaller.config["model_type"] == "seed_oss"
    assert smaller.config["head_dim"] == 8 and smaller.config["num_attention_heads"] == 4
    assert (smaller.config["attention_bias"], smaller.config["attention_out_bias"]) == (True, False)
    assert smaller.tied is not packed


def test_qwen2_with_all_its_heads_stays():
    assert left_as("qwen2", depth([0], ffn=range(64)), True).config["model_type"] == "qwen2"


def test_sliding_layers_survive_an_exit():
    """mistral is mlx-lm's llama, which needs the window for layers that slide."""
    smaller = left_as("llama", TO_THREE, layer_types=MIXED, sliding_window=8, **THREE)
    assert smaller.config["model_type"] == "mistral" and smaller.config["sliding_window"] == 8
    assert [layer.kind for layer in smaller.layers] == MIXED[:2]


def test_an_exit_that_would_lose_a_kind_is_refused():
    with pytest.raises(PareError, match="attention kind"):
        left_as("llama", TO_THREE, layer_types=MIXED, sliding_window=8, attention_bias=True, **THREE)


def test_a_null_in_the_config_stays_null():
    """transformers fills a missing sliding_window of mistral with 4096."""
    smaller = left_as("mistral", depth([0]), bos_token_id=None)
    assert smaller.config["sliding_window"] is None
    assert "bos_token_id" in smaller.config and smaller.config["bos_token_id"] is None


def test_a_tied_head_is_said_to_be_tied():
    arch = describe(pico.config_of("gemma3_text", vocab_size=512, tie_word_embeddings=False), untied=False)
    smaller = cut(arch, depth([0, 1, 2]))
    assert smaller.tied and smaller.config["tie_word_embeddings"] is True


# ---- rope ----


def test_the_old_rope_spelling_gains_the_new():
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = left_as("llama", rope_theta=5000.0, rope_scaling=scaling).config
    assert config["rope_parameters"] == {"rope_theta": 5000.0, **scaling}
    assert config["rope_theta"] == 5000.0 and config["rope_scaling"] == scaling


def test_the_old_rope_spelling_without_scaling():
    config = left_as("llama", rope_theta=5000.0, rope_scaling=None).config
    assert config["rope_parameters"] == {"rope_theta": 5000.0, "rope_type": "default"}
    assert not config.get("rope_scaling")


@pytest.mark.parametrize("null", [False, True])
def test_the_new_rope_spelling_gains_the_old(null):
    scaling = {"rope_type": "linear", "factor": 2.0}
    changes = {"rope_theta": None, "rope_parameters": {"rope_theta": 5000.0, **scaling}}
    config = left_as("llama", **changes, **({"rope_scaling": None} if null else {})).config
    assert config["rope_theta"] == 5000.0 and config["rope_scaling"] == scaling
    assert config["rope_parameters"] == changes["rope_parameters"]


def test_the_new_rope_spelling_of_the_default_has_no_scaling():
    changes = {"rope_theta": None, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    config = left_as("llama", **changes).config
    assert config["rope_theta"] == 5000.0 and not config.get("rope_scaling")


def test_gemma_keeps_both_of_its_bases():
    config = cut(describe(pico.config_of("gemma3_text", vocab_size=512)), depth([0, 1, 2])).config
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (10000.0, 1000.0)
    assert "rope_parameters" not in config


def test_gemma_keeps_heads_that_divide_its_hidden_size():
    """transformers, by which mlx-lm opens the tokenizer, refuses any other config; found with 3 of 4 kv heads."""
    arch = describe(pico.config_of("gemma3_text", vocab_size=512, num_attention_heads=8, num_key_value_heads=4))
    assert reach.space(arch, ("kv_head",), 1, []).choices["kv_head"] == [1, 2, 4]
    layers = tuple(LayerKeep(i, {"kv_head": [0, 1, 2]}) for i in range(len(arch.layers)))
    with pytest.raises(PareError, match="6 "):
        cut(arch, Keep(layers))
