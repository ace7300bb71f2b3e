"""LoRA of a 7B model: bfloat16 base, rank-16 float32 adapters on all seven projections.

command     python -m jaxsft.main --config=configs/lora_7b.py:model=DIR_OR_HUB_ID,data=FILE --workdir=runs/lora_7b
            :smoke=true instead runs the same graph on a tiny random model on a CPU in under a minute
hardware    one GPU or TPU chip of 24 GB. Arithmetic, not yet a measurement: 13.5 GB of bfloat16 weights, 0.5 GB adapters and moments, then activations
"""

from configs import common


def get_config(arg=None):
  """:model=DIR or hub id, data=FILE or hub id, eval=FILE, template=NAME (default: the model's own), smoke=true."""
  a = common.parse(arg, model=common.LLAMA2_7B, data="", eval="", template="", smoke=False)
  c = common.lora(common.base())
  c.model.path, c.data.train.path, c.data.eval.path = a.model, a.data, a.eval
  c.data.template = a.template or common.template_of(a.model)
  c.data.length, c.batch_size = 2048, 1
  return common.smoke(c) if a.smoke else c
