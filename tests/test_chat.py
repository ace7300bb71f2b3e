"""python -m jaxsft.chat: text as it becomes certain, conversations, every kind of model, and the program as a user starts it."""

import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_models

from jaxsft import chat
from jaxsft.checkpoint import Checkpoints
from jaxsft.convert import orbax
from jaxsft.convert.hf import load_tokenizer
from jaxsft.convert.peft import write_peft
from jaxsft.convert.source import open_source
from jaxsft.data.tokenizer import byte_tokenizer
from jaxsft.errors import UserError
from jaxsft.generate import Answer
from jaxsft.inference import open_model
from jaxsft.models import decoder
from jaxsft.step import TrainState
from jaxsft.transforms import lora
from jaxsft.transforms import tree as trees

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = "Grüße, 你好 👩‍👩‍👧!\n\tπ ≈ 3.14"
MARKED = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def streamed(tokenizer, ids, size=1):
  """(pieces written, whole text) of tokens that come `size` at a time."""
  pieces = []
  stream = chat.TextStream(tokenizer, pieces.append)
  for start in range(0, len(ids), size):
    stream.feed(ids[start:start + size])
  return pieces, stream.finish()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_characters_of_several_tokens_are_written_whole(size):
  tokenizer = byte_tokenizer()
  ids = tokenizer(TEXT).input_ids
  assert len(ids) == len(TEXT.encode())
  pieces, text = streamed(tokenizer, ids, size)
  assert text == "".join(pieces) == TEXT and "\ufffd" not in text and len(pieces) > len(ids) // (size + 3)


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen2.5"])
def test_blanks_and_rare_characters_of_real_tokenizers(shared, name):
  """SentencePiece writes a blank with the word that follows it, and rare characters in bytes."""
  tokenizer = load_tokenizer(shared / "data/tokenizers" / name)
  text = "Once upon a time,  there was 🦉 and ꙮ. \n\n  Indented"
  pieces, whole = streamed(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)
  assert whole == "".join(pieces) == text and "\ufffd" not in "".join(pieces[:-1]) and " upon" in pieces


def test_a_character_that_never_ends_is_shown_at_the_end():
  tokenizer = byte_tokenizer()
  pieces, text = streamed(tokenizer, tokenizer("ok 你").input_ids[:-1])
  assert "".join(pieces[:-1]) == "ok " and text == "".join(pieces) == "ok \ufffd"


def test_control_tokens_are_no_text():
  tokenizer = byte_tokenizer()
  assert streamed(tokenizer, [*tokenizer("a").input_ids, 1, *tokenizer("b").input_ids])[1] == "ab"


def test_nothing_steers_the_terminal():
  assert chat.visible("a\x1b[31mred\x07\x9b2J\r\u202eevil\x7f") == "a\\x1b[31mred\\x07\\x9b2J\\r\\u202eevil\\x7f"
  assert chat.visible(TEXT) == TEXT and chat.visible("a\u00a0b\u3000c\u200cd") == "a\u00a0b\u3000c\u200cd"


class FakeGenerator:
  """Answers in fixed pieces of bytes; notes the prompts and settings it was given."""

  def __init__(self, pieces, error=None):
    self.pieces, self.error, self.prompts, self.settings = pieces, error, [], []

  def sample(self, params, prompts, *, on_tokens, **settings):
    self.prompts.append(prompts[0]), self.settings.append(settings)
    for piece in self.pieces:
      on_tokens(0, piece)
    if self.error:
      raise self.error
    return [Answer(sum(self.pieces, []), True)]


def session(pieces, error=None, positions=4096, system=None, max_new_tokens=64):
  """(Session, FakeGenerator, list of what was written): prompts are the messages' texts as bytes."""
  tokenizer = byte_tokenizer()
  written = []
  generator = FakeGenerator([tokenizer(piece).input_ids for piece in pieces], error)
  encode = lambda messages: tokenizer("".join(f"[{m['role']}]{m['content']}" for m in messages)).input_ids
  model = types.SimpleNamespace(cfg=types.SimpleNamespace(max_position_embeddings=positions), params=None, tokenizer=tokenizer, stop_ids=(2,),
                                generator=generator, encode=encode)
  return chat.Session(model, {"max_new_tokens": max_new_tokens, "seed": 5}, system, written.append), generator, written


def prompts(generator):
  return [byte_tokenizer().decode(prompt) for prompt in generator.prompts]


def test_a_conversation_remembers_until_it_is_reset():
  talk, generator, written = session(["Hel", "lo"], system="Be kind.")
  assert talk.ask("Hi") == chat.Reply("Hello", 5, True, False, 0)
  talk.ask("Again")
  talk.reset()
  talk.ask("Who?")
  assert prompts(generator) == ["[system]Be kind.[user]Hi", "[system]Be kind.[user]Hi[assistant]Hello[user]Again", "[system]Be kind.[user]Who?"]
  assert written == ["Hel", "lo"] * 3 and [s["seed"] for s in generator.settings] == [5, 6, 7] and generator.settings[0]["stop_ids"] == (2,)


def test_ctrl_c_keeps_the_session_and_what_was_said():
  talk, generator, _ = session(["Hel"], KeyboardInterrupt())
  assert talk.ask("Hi") == chat.Reply("Hel", 3, False, True, 0)
  generator.error = None
  talk.ask("Go on")
  assert prompts(generator)[1] == "[user]Hi[assistant]Hel[user]Go on"
  talk, generator, _ = session([], KeyboardInterrupt())
  talk.ask("Hi")
  assert talk.messages == []                 # nothing was answered: nothing happened


def test_the_oldest_turns_make_room():
  talk, generator, _ = session(["Hello"], positions=100, max_new_tokens=1000, system="S")
  replies = [talk.ask(f"question {n}") for n in range(4)]
  assert [reply.left_out for reply in replies] == [0, 0, 2, 2] and all(len(prompt) <= 75 for prompt in generator.prompts)
  assert prompts(generator)[3] == "[system]S[user]question 2[assistant]Hello[user]question 3"
  talk.ask("x" * 80)                         # no room for a quarter, but for one token
  with pytest.raises(UserError, match="this message makes a prompt of 117 tokens; wanted at most the model's 100 positions"):
    talk.ask("x" * 102)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
  """(directory with a byte tokenizer and ChatML, torch model)."""
  directory = tmp_path_factory.mktemp("tiny")
  return directory, tiny_models.save_tiny(directory, tokenizer=byte_tokenizer(), max_position_embeddings=16384)


def greedy_text(model, messages, count, template=None):
  """transformers' own greedy answer under the template."""
  tokenizer = byte_tokenizer()
  ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, chat_template=template)
  return tokenizer.decode(tiny_models.greedy(model, ids, count, [2]), skip_special_tokens=True)


def answer(model, question="Hi", count=24):
  """The greedy text of an opened model."""
  return chat.Session(model, {"max_new_tokens": count, "temperature": 0.0}).ask(question).text


def program(*arguments, **how):
  env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONIOENCODING="utf-8")
  return subprocess.run([sys.executable, "-m", "jaxsft.chat", *map(str, arguments)], capture_output=True, text=True, env=env, encoding="utf-8", **how)


def test_one_question_end_to_end(tiny_dir):
  directory, model = tiny_dir
  expected = greedy_text(model, [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}], 24)
  done = program(directory, "--prompt=Hi", "--system=S", "--temperature=0", "--max-new-tokens=24", "--json")
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout)           # the only line
  assert report.pop("seconds") > 0 and report == {"prompt": "Hi", "answer": expected, "tokens": 24, "stopped": False}
  done = program(directory, "--prompt=-", "--system=S", "--temperature=0", "--max-new-tokens=24", input="Hi\n")
  assert (done.returncode, done.stdout) == (0, chat.visible(expected) + "\n")


def test_help_needs_no_device_and_no_jax():
  code = "import sys, jaxsft.chat\ntry: jaxsft.chat.main(['--help'])\nfinally: assert not {'jax', 'transformers', 'numpy'} & set(sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="none"))
  assert done.returncode == 0 and "--max-new-tokens" in done.stdout and "/reset" in done.stdout, done.stderr


def refused(capsys, *arguments):
  """Exit code 2 wanted; gives the one line on standard error."""
  capsys.readouterr()
  assert chat.main([*map(str, arguments)]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
  return err


def test_mistakes_are_one_line(tiny_dir, tmp_path, capsys):
  directory, _ = tiny_dir
  assert "does not exist" in (err := refused(capsys, tmp_path / "nope/x", "--prompt=x")) and "set MODEL" in err
  assert "set --temperature" in refused(capsys, directory, "--prompt=x", "--temperature=-1")
  assert "set --max-new-tokens" in refused(capsys, directory, "--prompt=x", "--max-new-tokens=0")
  assert "set --top-p" in refused(capsys, directory, "--prompt=x", "--top-p=2")
  assert "set --step" in refused(capsys, directory, "--prompt=x", "--step=3")
  assert "is no adapter" in refused(capsys, directory, "--prompt=x", f"--base={directory}")
  assert "set --prompt" in refused(capsys, directory, "--json")
  assert "did you mean 'chatml'" in (err := refused(capsys, directory, "--prompt=x", "--template=chatlm")) and "set --template" in err
  assert "cuts into" in (err := refused(capsys, directory, "--prompt=x", "--template=vicuna")) and "set --template" in err
  tokenizer = byte_tokenizer()
  tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + MARKED
  tiny_models.save_tiny(tmp_path / "strict", tokenizer=tokenizer)
  assert "the chat template refuses this conversation (no system here)" in refused(capsys, tmp_path / "strict", "--prompt=x", "--system=y")
  tokenizer.chat_template = None
  bare = tmp_path / "bare"
  tiny_models.save_tiny(bare, tokenizer=tokenizer)
  assert "has no chat template" in refused(capsys, bare, "--prompt=x")
  assert chat.main([str(bare), "--prompt=x", "--template=chatml", "--max-new-tokens=2"]) == 0


@pytest.fixture
def adapted(tiny_dir, tmp_path):
  """adapted(quantised) -> (workdir of a run, its adapters, ModelConfig, source, nf4 settings)."""
  def make(quantised):
    source = open_source(tiny_dir[0])
    cfg, params = tiny_models.open_tiny(tiny_dir[0])
    adapters = lora.init_adapters(params, tiny.settings(tiny.LORA).lora.targets, 4, jax.random.key(0))
    adapters = trees.map_leaves(lambda path, x: jax.random.normal(jax.random.key(len(path)), x.shape) * 0.1, adapters)
    nf4 = {"targets": "_proj/kernel$", "double_quant": True} if quantised else {}
    meta = orbax.run_meta(cfg, source, chat_template=MARKED, end_of_turn_ids=[2], nf4=nf4,
                          lora={"rank": 4, "alpha": 8.0, "dropout": 0.1, "rslora": False})
    save_run(tmp_path / "run", {3: trees.map_leaves(lambda _, x: x * 0, adapters), 6: adapters}, meta)
    return tmp_path / "run", adapters, cfg, source, nf4
  return make


def save_run(workdir, trained, meta):
  checkpoints = Checkpoints(workdir / "checkpoints", keep=5)
  for step, tree in trained.items():
    tree = jax.tree.map(jnp.asarray, tree)
    checkpoints.save(step, TrainState(jnp.int32(step), tree, optax.adamw(1e-3).init(tree), (), jnp.zeros(2, jnp.uint32)), {}, meta)
    checkpoints.wait()
  checkpoints.close()


def hidden(model):
  batch = tiny.rows(V=259)
  return np.asarray(jax.jit(decoder.make_forward(model.cfg))(model.params, batch))


@pytest.mark.parametrize("quantised", [False, True])
def test_an_adapter_run_answers_as_peft_does(adapted, tiny_dir, tmp_path, quantised):
  """The run's own template; the newest step or the one asked for; prepared parameters equal the exact ones."""
  import peft
  from transformers import AutoModelForCausalLM
  run, adapters, cfg, source, nf4 = adapted(quantised)
  write_peft(tmp_path / "peft", adapters, cfg, rank=4, alpha=8.0, base=source.identity, nf4=nf4, end_of_turn_ids=[2], tokenizer=source.tokenizer(),
             chat_template=MARKED)
  model, exact, start = open_model(str(run)), open_model(str(run), exact=True), open_model(str(run), step=3)
  from_peft = open_model(str(tmp_path / "peft"))
  assert np.abs(hidden(model) - hidden(exact)).max() < 1e-4 and np.abs(hidden(model) - hidden(start)).max() > 0.1
  np.testing.assert_array_equal(hidden(model), hidden(from_peft))
  assert answer(model) == answer(exact) == answer(from_peft) != answer(start)
  assert model.encode([{"role": "user", "content": "Hi"}]) == byte_tokenizer()("[user]Hi<|im_end|>[assistant]").input_ids and model.stop_ids == (2,)
  if not quantised:
    oracle = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir[0]), tmp_path / "peft").eval()
    messages = [{"role": "user", "content": "Hi"}]
    assert answer(model) == greedy_text(oracle, messages, 24, MARKED)
    assert answer(start) == greedy_text(tiny_dir[1], messages, 24, MARKED)


def test_an_adapter_refuses_another_base(adapted, tmp_path, capsys):
  run, *_ = adapted(False)
  tiny_models.save_tiny(tmp_path / "other", seed=1, tokenizer=byte_tokenizer())
  assert "is not the base of" in (err := refused(capsys, run, "--prompt=x", f"--base={tmp_path / 'other'}")) and "set --base" in err


def test_a_full_run_answers_with_what_it_trained(tiny_dir, tmp_path):
  source = open_source(tiny_dir[0])
  cfg, params = tiny_models.open_tiny(tiny_dir[0])
  tiny_models.save_tiny(tmp_path / "target", seed=1)
  _, trained = tiny_models.open_tiny(tmp_path / "target")
  save_run(tmp_path / "run", {1: params, 2: trained}, orbax.run_meta(cfg, source, chat_template=MARKED, end_of_turn_ids=[2]))
  messages = [{"role": "user", "content": "Hi"}]
  other = tiny_models.save_tiny(tmp_path / "again", seed=1)
  assert answer(open_model(str(tmp_path / "run"))) == greedy_text(other, messages, 24, MARKED)
  assert answer(open_model(str(tmp_path / "run"), step=1)) == greedy_text(tiny_dir[1], messages, 24, MARKED)


class Terminal:
  """The program on a pseudo-terminal, as a person sees it."""

  def __init__(self, *arguments):
    self.side, other = pty.openpty()
    env = dict(os.environ, PYTHONPATH=str(ROOT), TERM="dumb")
    self.process = subprocess.Popen([sys.executable, "-m", "jaxsft.chat", *map(str, arguments)], stdin=other, stdout=other, stderr=other, env=env,
                                    start_new_session=True)
    os.close(other)
    self.seen = ""

  def until(self, arrived, nudge=lambda: None, seconds=120):
    """Reads on until `arrived(what came since the call)`; gives that. Calls `nudge` in every second without news."""
    end, start = time.monotonic() + seconds, len(self.seen)
    while not arrived(self.seen[start:]):
      assert time.monotonic() < end, self.seen
      if select.select([self.side], [], [], 1)[0]:
        self.seen += os.read(self.side, 4096).decode("utf-8", "replace")
      else:
        nudge()
    return self.seen[start:]

  def type(self, text):
    os.write(self.side, text.encode())


def test_a_conversation_on_a_terminal_survives_ctrl_c(tiny_dir, tmp_path):
  """A model that never stops: an answer of 15,000 tokens is cut short by Ctrl-C, and the session goes on."""
  import torch
  tiny_models.save_tiny(tmp_path, tokenizer=byte_tokenizer(), max_position_embeddings=16384)
  model = type(tiny_dir[1]).from_pretrained(tmp_path)
  with torch.no_grad():
    model.lm_head.weight[2] = 0
  model.save_pretrained(tmp_path)
  terminal = Terminal(tmp_path, "--temperature=0", "--max-new-tokens=15000")
  says = lambda text: lambda seen: text in seen
  prompt_after = lambda text: lambda seen: "> " in seen.partition(text)[2]        # both may come at once
  try:
    terminal.until(says("> "))
    terminal.type("Hi\n")
    terminal.until(lambda seen: len(seen) > 60)
    terminal.process.send_signal(signal.SIGINT)
    assert "\x1b" not in terminal.until(prompt_after("[stopped]"))
    terminal.type("/reset\n")
    terminal.until(prompt_after("forgotten"))
    terminal.until(says("Ctrl-C stops an answer"), nudge=lambda: terminal.process.send_signal(signal.SIGINT))      # at the prompt: a hint
    terminal.type("/quit\n")
    assert terminal.process.wait(20) == 0
  finally:
    terminal.process.kill()
    os.close(terminal.side)
