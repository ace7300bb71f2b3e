"""Reader of llama2.c's files: a header of seven int32 and float32 weights, and a vocabulary of scored pieces (github.com/karpathy/llama2.c)."""

import re
import struct

import numpy as np

from jaxsft.models.config import ModelConfig
from jaxsft.transforms import tree


def read_model(file):
  """(ModelConfig, parameter tree) of a .bin with the first layout. llama2.c turns neighbours (0, 1), (2, 3) ...; ours are half a head apart."""
  raw = file.read_bytes()
  width, hidden, layers, heads, groups, vocabulary, length = struct.unpack("7i", raw[:28])
  cfg = ModelConfig("llama", abs(vocabulary), width, hidden, layers, heads, groups, width // heads, rms_norm_eps=1e-5,
                    tie_word_embeddings=vocabulary > 0, max_position_embeddings=length)
  numbers, at = np.frombuffer(raw, np.float32, offset=28), 0

  def take(*shape):
    nonlocal at
    at += int(np.prod(shape))
    return numbers[at - int(np.prod(shape)):at].reshape(shape)

  def linear(outputs, inputs, turned=0):
    w = take(layers, outputs, inputs)
    if turned:
      w = w.reshape(layers, turned, -1, 2, inputs).swapaxes(2, 3).reshape(layers, outputs, inputs)
    return w.swapaxes(1, 2)
  shared = groups * cfg.head_dim
  at_layer = "layers/"
  leaves = {"embed_tokens/embedding": take(cfg.vocab_size, width)}
  leaves[at_layer + "input_layernorm/scale"] = take(layers, width)
  for name, outputs, turned in (("q", width, heads), ("k", shared, groups), ("v", shared, 0), ("o", width, 0)):
    leaves[f"{at_layer}self_attn/{name}_proj/kernel"] = linear(outputs, width, turned)
  leaves[at_layer + "post_attention_layernorm/scale"] = take(layers, width)
  for name, outputs, inputs in (("gate", hidden, width), ("down", width, hidden), ("up", hidden, width)):
    leaves[f"{at_layer}mlp/{name}_proj/kernel"] = linear(outputs, inputs)
  leaves["norm/scale"] = take(width)
  take(2, length, cfg.head_dim // 2)                  # tables of cosines and sines
  if vocabulary < 0:
    leaves["lm_head/kernel"] = take(cfg.vocab_size, width).T
  assert at == numbers.size
  return cfg, tree.unflatten(leaves)


def read_pieces(file, count):
  """The vocabulary: `count` byte strings; "<0x0A>" stands for the byte."""
  raw, at, pieces = file.read_bytes(), 4, []
  for _ in range(count):
    _, size = struct.unpack("fi", raw[at:at + 8])
    piece = raw[at + 8:at + 8 + size]
    byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
    pieces.append(bytes([int(byte[1], 16)]) if byte else piece)
    at += 8 + size
  assert at == len(raw)
  return pieces


def text(pieces, tokens):
  """What llama2.c prints for tokens that follow a BOS: the first blank is left out."""
  return b"".join(pieces[token] for token in tokens).decode().removeprefix(" ")
