"""The demo: SmolLM2-135M-Instruct learns by QLoRA to turn support mails into one-line JSON tickets.

command     make demo; training alone: python -m jaxsft.main --config=configs/demo.py --workdir=runs/demo
            The model is the one `make demo` leaves in .cache; `python -m jaxsft.convert.demo_model` fetches it alone.
            :seed=1 another seed; :smoke=true the same graph on a tiny random model, in under a minute.
hardware    a CPU with 2 cores.
memory      2.1 GiB at most (measured)
time        4 minutes of training, 140 steps (measured, 2 cores)
"""

from configs import common


def get_config(arg=None):
  """:model=DIR or hub id, data=FILE, eval=FILE, seed=NUMBER, smoke=true (a tiny random model on a CPU)."""
  a = common.parse(arg, model=".cache/SmolLM2-135M-Instruct", data="demo/tickets_train.jsonl", eval="demo/tickets_eval.jsonl", seed=0, smoke=False)
  c = common.qlora(common.base())
  c.seed, c.model.path, c.data.train.path, c.data.eval.path = a.seed, a.model, a.data, a.eval
  c.model.dtype = c.model.base_dtype = "float32"       # a CPU multiplies bfloat16 no faster
  c.model.remat = "none"                               # so small a model has room for its activations
  c.data.length, c.batch_size, c.steps = 256, 1, 140    # three mails a row and a step: once through the 400
  c.optim.learning_rate, c.optim.warmup = 1e-3, 0.06   # five times the usual: a small model and few steps
  c.eval.every, c.checkpoint.every, c.log.every = 140, 140, 5
  return common.smoke(c) if a.smoke else c
