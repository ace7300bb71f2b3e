"""SmolLM2-135M-Instruct on the grade-school sums of GSM8K: LoRA, 100 steps. Real data through the same path as the demo's.

command     python -m jaxsft.main --config=configs/gsm8k.py:data=PATH/train.jsonl --workdir=runs/gsm8k
            PATH/train.jsonl is GSM8K's own file, or any of its form: {"question", "answer"} a line; 2 % of it is held out.
            The model is the one `make demo` leaves in .cache; `python -m jaxsft.convert.demo_model` fetches it alone.
hardware    a CPU with 2 cores.
memory      2.1 GiB at most (measured)
time        13 minutes beside other work on the same two cores, 172 tokens/s in the median step; evaluation loss 1.317 -> 0.833 (seed 0, measured)
"""

from configs import common


def get_config(arg=None):
  """:data=FILE, eval=FILE, model=DIR or hub id, smoke=true (a tiny random model, the demo's tickets)."""
  a = common.parse(arg, model=".cache/SmolLM2-135M-Instruct", data="", eval="", smoke=False)
  c = common.lora(common.base())
  c.model.path, c.data.train.path, c.data.eval.path = a.model, a.data, a.eval
  c.model.dtype = c.model.base_dtype = "float32"       # a CPU multiplies bfloat16 no faster
  c.data.eval_share = 0.0 if a.eval else 0.02
  c.data.length, c.batch_size, c.steps = 512, 2, 100    # two to three problems a row
  c.eval.every, c.eval.rows, c.checkpoint.every = 50, 32, 50
  return common.smoke(c) if a.smoke else c
