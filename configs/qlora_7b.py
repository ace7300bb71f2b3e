"""QLoRA of a 7B model: NF4 base with double quantisation, rank-16 float32 adapters on all seven projections.

command     python -m jaxsft.main --config=configs/qlora_7b.py:model=DIR_OR_HUB_ID,data=FILE --workdir=runs/qlora_7b
            :smoke=true instead runs the same graph on a tiny random model on a CPU in under a minute
hardware    one GPU or TPU chip. Arithmetic, not yet a measurement: 3.3 GB of codes and scales, 0.5 GB bfloat16 embeddings and head, 0.5 GB adapters
            and moments, then activations of 1 x 2,048 tokens (about 6.3 to 6.8 GiB in the compiler's figures of shared specs; step 4 checks it here)
"""

from configs import common


def get_config(arg=None):
  """:model=DIR or hub id, data=FILE or hub id, eval=FILE, template=NAME (default: the model's own), smoke=true."""
  a = common.parse(arg, model=common.LLAMA2_7B, data="", eval="", template="", smoke=False)
  c = common.qlora(common.base())
  c.model.path, c.data.train.path, c.data.eval.path = a.model, a.data, a.eval
  c.data.template = a.template or common.template_of(a.model)
  c.data.length, c.batch_size = 2048, 1
  return common.smoke(c) if a.smoke else c
