"""The writers by themselves: what is cut on resume, what is summed up, what a log that is no terminal sees."""

import contextlib
import io
import json

import pytest

from jaxsft import metrics, preflight


def test_lines_past_the_restored_step_and_a_half_line_are_cut(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)) + '{"step": 3, "lo')
  writer = metrics.JsonLines(path, start=2)
  writer.write(3, {"loss": float("nan"), "tokens": 4})
  writer.close()
  assert [line["step"] for line in metrics.read_json_lines(path)] == [0, 1, 2, 3]
  assert metrics.read_json_lines(path)[-1] == {"step": 3, "loss": "nan", "tokens": 4}       # JSON has no NaN
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_summary_is_of_the_whole_run_and_of_what_there_is():
  lines = [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 8.0, "tokens_per_second": 1.0}, {"step": 2, "loss": 7.0, "tokens_per_second": 30.0},
           {"step": 3, "loss": 6.0, "eval_loss": 5.0, "tokens_per_second": 20.0}]
  assert metrics.summarise(lines) == {"train_loss_first": 8.0, "train_loss_last": 6.0, "eval_loss_before": 9.0, "eval_loss_after": 5.0,
                                      "tokens_per_second": 25.0}      # the first step compiles
  assert set(metrics.summarise([]).values()) == {None}
  assert metrics.summarise(lines[1:2])["tokens_per_second"] == 1.0


def test_no_escape_codes_in_a_log_whatever_the_environment_says(monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("COLUMNS", "300")
  with contextlib.redirect_stderr(io.StringIO()) as said:
    preflight.print_table({"data": {"source": "x" * 400, "drops": {}}, "rules": {"lora.targets (q|k)_proj/kernel$": 7}, "steps": 12345})
    terminal = metrics.Terminal(0, 4)
    terminal.write(1, {"loss": 1.0, "tokens_per_second": 1234.5})
    terminal.say("[bold]not markup[/bold]")
    terminal.close()
  text = said.getvalue()
  assert "\x1b" not in text and "[bold]not markup[/bold]" in text and "step 1/4  loss 1.0000  1,234 tok/s" in text
  assert max(map(len, text.splitlines())) <= 100 and "drops none" in text and "12,345" in text and "lora.targets (q|k)_proj/kernel$: 7" in text


@pytest.mark.parametrize("key,value,text", [
    ("bytes", 131_072, "131 kB"), ("bytes_a_device", 3_500_000_000, "3.5 GB"), ("padding_share", 0.0324, "3.2%"), ("mean", 250.24, "250.2"),
    ("records", 100068, "100,068"), ("pack", True, "yes"), ("drops", {}, "none"),
    ("drops", {"too_long": {"count": 2, "first": "a:1"}}, "too long count 2, first a:1")])
def test_values_of_the_table_are_for_people(key, value, text):
  assert preflight._text(key, value) == text
