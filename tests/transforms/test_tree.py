"""Parameter trees as paths, and rules over them."""

import pytest

from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import tree as trees

TREE = {"embed_tokens": {"embedding": 1}, "layers": {"mlp": {"up_proj": {"kernel": 2, "bias": 3}}, "self_attn": {"q_proj": {"kernel": (4, 5)}}}, "norm": {"scale": None}}
PATHS = ["embed_tokens/embedding", "layers/mlp/up_proj/kernel", "layers/mlp/up_proj/bias", "layers/self_attn/q_proj/kernel", "norm/scale"]


def test_flatten_and_unflatten_are_inverse_and_keep_the_order():
  assert [path for path, _ in trees.flatten(TREE)] == PATHS
  assert trees.unflatten(dict(trees.flatten(TREE))) == TREE
  assert dict(trees.flatten(TREE))["layers/self_attn/q_proj/kernel"] == (4, 5)            # anything that is no dict is a leaf


def test_map_leaves_sees_each_path_once():
  assert trees.map_leaves(lambda path, leaf: (path, leaf), TREE) == trees.unflatten({path: (path, leaf) for path, leaf in trees.flatten(TREE)})


def test_split_and_merge_are_inverse_and_share_no_leaf():
  kernels, rest = trees.split(TREE, lambda path: path.endswith("kernel"))
  assert kernels == {"layers": {"mlp": {"up_proj": {"kernel": 2}}, "self_attn": {"q_proj": {"kernel": (4, 5)}}}}
  assert [path for path, _ in trees.flatten(rest)] == ["embed_tokens/embedding", "layers/mlp/up_proj/bias", "norm/scale"]
  assert trees.merge(kernels, rest) == trees.merge(rest, kernels) == TREE
  assert trees.split(TREE, lambda path: False) == ({}, TREE)


def test_merge_leaves_its_inputs_alone():
  first, second = {"a": {"x": 1}}, {"a": {"y": 2}, "b": 3}
  assert trees.merge(first, second) == {"a": {"x": 1, "y": 2}, "b": 3}
  assert (first, second) == ({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})


def test_get_reads_leaves_and_nodes():
  assert trees.get(TREE, "layers/mlp/up_proj/bias") == 3
  assert trees.get(TREE, "layers/mlp") == {"up_proj": {"kernel": 2, "bias": 3}}
  with pytest.raises(KeyError):
    trees.get(TREE, "layers/mlp/down_proj")


LLAMA = list(families.shapes(ModelConfig(model_type="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                         num_key_value_heads=1, head_dim=8)))


@pytest.mark.parametrize("regex, count", [(r"(q|k|v|o)_proj/kernel$", 4), (r"_proj/kernel$", 7), (r"^norm/", 1), ("norm", 3), ("", len(LLAMA))])
def test_matching_finds_what_the_pattern_means(regex, count):
  assert len(trees.matching(LLAMA, regex, "knob")) == count


@pytest.mark.parametrize("regex, nearest", [("wq", "q_proj"), ("query_proj", "q_proj"), ("gate_up_proj", "gate_proj"), ("mlp/gate/kernel", "mlp/gate_proj/kernel"),
                                            (r"^embedtokens/embedding$", "embed_tokens/embedding"), ("(down_project|w2)", "down_proj"), ("lmhead", "lm_head"),
                                            ("[", None), ("***", None)])
def test_a_pattern_that_matches_nothing_names_the_nearest(regex, nearest):
  with pytest.raises(UserError) as error:
    trees.matching(LLAMA, regex, "lora.targets")
  message = str(error.value)
  assert "lora.targets" in message and repr(regex) in message and "\n" not in message
  assert (f"{nearest}" in message and "matches no parameter" in message) if nearest else "is no regular expression" in message


def test_a_pattern_over_no_parameters_at_all_is_still_one_message():
  with pytest.raises(UserError, match="there is no such parameter"):
    trees.matching([], "x", "freeze")


def test_the_output_projection_is_no_kernel_that_a_rule_may_take():
  """The chunked loss reads the head as a plain array: an adapter or codes there would be a crash in the middle of the first step."""
  assert "lm_head/kernel" in LLAMA and trees.kernels(LLAMA) == [path for path in LLAMA if path.endswith("_proj/kernel")]


def test_assign_takes_the_first_rule_and_refuses_an_uncovered_leaf():
  rules = [("layers/mlp", "a"), ("_proj", "b"), ("embed|norm", "c")]
  assert trees.assign(PATHS, rules, "sharding") == dict(zip(PATHS, ["c", "a", "a", "b", "c"]))
  with pytest.raises(UserError, match=r"no rule of sharding covers the parameter 'norm/scale'"):
    trees.assign(PATHS, [("embed|proj", 1)], "sharding")
