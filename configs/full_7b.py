"""Full fine-tuning of a 7B model: every parameter, float32 master weights and moments.

command     python -m jaxsft.main --config=configs/full_7b.py:model=DIR_OR_HUB_ID,data=FILE --workdir=runs/full_7b
            :smoke=true instead runs the same graph on a tiny random model on a CPU in under a minute
hardware    a pod slice or several GPUs: --config.mesh.fsdp=N. Arithmetic, not yet a measurement: 6.7e9 x 16 bytes (weights, moments, gradients in
            float32) = 108 GB over the devices, then activations
"""

from configs import common


def get_config(arg=None):
  """:model=DIR or hub id, data=FILE or hub id, eval=FILE, template=NAME (default: the model's own), smoke=true."""
  a = common.parse(arg, model=common.LLAMA2_7B, data="", eval="", template="", smoke=False)
  c = common.full(common.base())
  c.model.path, c.data.train.path, c.data.eval.path = a.model, a.data, a.eval
  c.data.template = a.template or common.template_of(a.model)
  c.data.length, c.batch_size = 2048, 1
  return common.smoke(c) if a.smoke else c
