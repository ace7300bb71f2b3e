"""The config of the run tests: both training modes on the smallest model that has every part, so that a run compiles in seconds."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg=None):
  """:data=FILE,eval=FILE,mode=qlora|full,wide=true (SmolLM2's width). QLoRA has dropout and NEFTune."""
  a = common.parse(arg, data="", eval="", mode="qlora", wide=False)
  c = common.smoke(common.qlora(common.base()) if a.mode == "qlora" else common.full(common.base()))
  if a.mode == "qlora":
    c.lora.rank, c.lora.dropout, c.neftune.alpha = 4, 0.1, 5.0
  c.model.shape = ConfigDict(c.model.shape.to_dict() | dict(intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
                               | (dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3) if a.wide else {}))
  c.data.train.path, c.data.eval.path = a.data, a.eval
  c.data.length, c.batch_size, c.micro_batches, c.steps = 64, 16, 2, 4
  c.optim.learning_rate = 1e-2
  c.eval.every, c.checkpoint.every, c.log.every = 2, 2, 1
  return c
