"""lora 7B

HEADER
"""

from configs import common


def get_config(arg=None):
  """:model=DIR or hub id, data=FILE or hub id, eval=FILE, smoke=true (a tiny random model on a CPU)."""
  a = common.parse(arg, model="meta-llama/Llama-2-7b-hf", data="", eval="", smoke=False)
  c = common.lora(common.base())
  c.model.path, c.data.train.path, c.data.eval.path = a.model, a.data, a.eval
  c.data.template, c.data.length, c.batch_size = "llama2", 2048, 1
  return common.smoke(c) if a.smoke else c
