"""The arithmetic of bytes against the bytes of trees that were really loaded and placed; and what is refused before anything is."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from jaxsft import arithmetic, sharding
from jaxsft import base as bases
from jaxsft.errors import UserError
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import nf4
from jaxsft.transforms import tree as trees
from jaxsft.transforms.policy import trained_whole

MESHES = [dict(data=1, fsdp=1, tensor=1), dict(data=8, fsdp=1, tensor=1), dict(data=1, fsdp=8, tensor=1), dict(data=2, fsdp=2, tensor=2)]


def mesh_of(**sizes):
  return sharding.make_mesh(ConfigDict(sizes), jax.devices()[:int(np.prod(list(sizes.values())))])


def held_after_loading(c, cfg, mesh):
  """{group: bytes on the fullest device} of what base.load and the method's init really make, placed as train.py places it."""
  _, method = tiny.make(c, cfg, mesh)
  trainable, frozen, opt, aux = method.init(bases.load(c, bases.Base(cfg, None, None), mesh, trained=trained_whole(c)), jax.random.key(0))
  trees_ = sharding.place({"trainable": trainable, "opt": opt, "aux": aux}, mesh)
  leaves = [leaf for _, leaf in trees.flatten(sharding.place(frozen, mesh)) if leaf is not None]
  gradients = jax.tree.map(lambda x: x.astype(jnp.float32), trees_["trainable"])
  return {"frozen_nf4": sharding.bytes_a_device([leaf for leaf in leaves if isinstance(leaf, nf4.NF4Array)]),
          "frozen": sharding.bytes_a_device([leaf for leaf in leaves if not isinstance(leaf, nf4.NF4Array)]),
          "trainable": sharding.bytes_a_device(trees_["trainable"]), "gradients": sharding.bytes_a_device(sharding.place(gradients, mesh)),
          "optimiser": sharding.bytes_a_device(trees_["opt"]), "aux": sharding.bytes_a_device(trees_["aux"])}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("mode, over", [(tiny.FULL, {}), (tiny.LORA, {}), (tiny.QLORA, {}), (tiny.QLORA, {"nf4.double_quant": False}),
                                        (tiny.FULL, {"freeze": "embed_tokens"}), (tiny.FULL, {"optim.state": "bfloat16_stochastic"}),
                                        (tiny.FULL, {"optim.name": "adafactor", "model.base_dtype": "bfloat16"}),
                                        (tiny.FULL, {"method.name": "dpo"})], ids=str)
def test_figures_equal_the_bytes_of_the_loaded_trees(mode, over, sizes, monkeypatch):
  c, cfg, mesh = tiny.settings(mode, **over), tiny.config(attention_bias=True), mesh_of(**sizes)
  _, method = tiny.make(c, cfg, mesh)
  asked = []
  monkeypatch.setattr(arithmetic, "check", asked.append)
  bases.load(c, bases.Base(cfg, None, None), mesh, method.init, trained_whole(c))      # as train.py calls it
  found = asked[0]["device_bytes"]
  assert found == held_after_loading(c, cfg, mesh)
  assert bool(found["frozen_nf4"]) == (mode == tiny.QLORA) and (found["optimiser"] > found["trainable"] or c.optim.name == "adafactor") and found["gradients"] > 0
  if sizes["fsdp"] == 8:
    assert found["gradients"] < arithmetic.device_bytes(c, cfg, mesh_of(**MESHES[0]), method.init)["gradients"] / 4


def test_four_bits_count_half_a_byte(monkeypatch):
  """As on GPU and TPU, where codes are uint4."""
  monkeypatch.setattr(nf4, "codes_dtype", lambda: jnp.uint4)
  c, cfg, mesh = tiny.settings(tiny.QLORA), tiny.config(), mesh_of(**MESHES[3])
  _, method = tiny.make(c, cfg, mesh)
  assert arithmetic.device_bytes(c, cfg, mesh, method.init) == held_after_loading(c, cfg, mesh)


def llama2_7b(monkeypatch, mode, **over):
  """(c, cfg, init) at Llama-2-7B's shape, codes in 4 bits."""
  monkeypatch.setattr(nf4, "codes_dtype", lambda: jnp.uint4)
  cfg = ModelConfig.from_hf(dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                 num_attention_heads=32))
  c = tiny.settings(mode, **over)
  c.lora.rank = 16 if c.lora.rank else 0
  return c, cfg, tiny.make(c, cfg)[1].init


def test_a_7b_base_takes_what_the_paper_says(monkeypatch):
  """6.476e9 linear weights at 4.127 bits = 3.34 GB, 0.52 GB of bfloat16 embedding and head; 39,976,960 adapter weights (shared facts)."""
  c, cfg, init = llama2_7b(monkeypatch, tiny.QLORA)
  held = arithmetic.device_bytes(c, cfg, mesh_of(**MESHES[0]), init)
  assert held["frozen_nf4"] / 1e9 == pytest.approx(6.476 * 4.127 / 8, rel=1e-3) and held["frozen"] / 1e9 == pytest.approx(0.525, rel=2e-3)
  assert held["trainable"] == held["gradients"] == 4 * 39_976_960 and held["optimiser"] == pytest.approx(8 * 39_976_960, abs=100)


def source(doubles):
  """What arithmetic asks of a source: the NF4 tensors it holds, and its bytes."""
  return types.SimpleNamespace(nf4=doubles, stored_bytes=123_000_000)


def test_scales_are_counted_as_the_file_holds_them():
  """A bitsandbytes file without double quantisation keeps float32 scales, whatever nf4.double_quant says."""
  c, cfg, mesh = tiny.settings(tiny.QLORA), tiny.config(), mesh_of(**MESHES[0])
  _, method = tiny.make(c, cfg)
  held = source({f"model.layers.{layer}.mlp.up_proj.weight": False for layer in range(2)})
  plain, own = (arithmetic.device_bytes(c, cfg, mesh, method.init, held)["frozen_nf4"] for held in (source({}), held))
  assert own - plain == 2 * (128 * (4 - 1) - 4 - 4)           # a layer: 128 scales of 4 bytes for 1, without one absmax2 and the offset


def test_the_line_names_every_group_and_the_mesh(monkeypatch, capsys):
  c, cfg, init = llama2_7b(monkeypatch, tiny.QLORA)
  monkeypatch.setattr(arithmetic, "device_limit", lambda mesh: 80_000_000_000)
  facts = arithmetic.tell(c, cfg, mesh_of(data=2, fsdp=4, tensor=1), init, source({}))
  said = " ".join(capsys.readouterr().err.split())          # it is folded at 100 columns
  assert said.startswith("memory by arithmetic: ") and facts["resident_bytes"] < facts["limit_bytes"]
  assert "123 MB to read; each of 8 devices (data 2 x fsdp 4) holds NF4 base 8" in said and "of 80 GB before activations" in said
  assert all(word in said for word in ("bfloat16 base 132 MB", "trainable 40 MB", "gradients 40 MB", "optimiser 80 MB")), said


@pytest.mark.parametrize("mode, limit, words", [
    (tiny.QLORA, 3.5e9, ["the frozen base alone takes 3.87 GB", "has 3.5 GB", "set nf4.targets", "mesh.fsdp"]),
    (tiny.LORA, 12e9, ["the frozen base alone takes 13.5 GB", "nf4.targets", "mesh.fsdp"]),
    (tiny.LORA, 13.6e9, ["parameters and optimiser take 14 GB", "has 13.6 GB", "mesh.fsdp"]),
    (tiny.FULL, 80e9, ["parameters and optimiser take 80.9 GB", "lora.rank", "mesh.fsdp"])])
def test_what_can_never_fit_is_refused_before_anything_is_read(monkeypatch, capsys, mode, limit, words):
  c, cfg, init = llama2_7b(monkeypatch, mode)
  monkeypatch.setattr(arithmetic, "device_limit", lambda mesh: int(limit))
  monkeypatch.setattr(bases, "_random", lambda *args: pytest.fail("weights were made"))
  with pytest.raises(UserError) as error:
    bases.load(c, bases.Base(cfg, None, None), mesh_of(**MESHES[0]), init)
  assert all(word in str(error.value) for word in words), str(error.value)
  assert "before activations" in capsys.readouterr().err


def test_no_limit_is_known_and_none_is_guessed(monkeypatch):
  c, cfg, init = llama2_7b(monkeypatch, tiny.FULL)
  monkeypatch.setattr(arithmetic, "device_limit", lambda mesh: None)
  facts = arithmetic.tell(c, cfg, mesh_of(**MESHES[0]), init)
  assert " of None" not in arithmetic.line(facts) and " GB before activations" in arithmetic.line(facts)


def test_the_limit_of_simulated_devices_is_their_share_of_the_host():
  one, eight = (arithmetic.device_limit(mesh_of(**sizes)) for sizes in MESHES[:2])
  assert one // 8 == eight and one > 1_000_000_000
