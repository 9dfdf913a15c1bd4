"""Environments: conversations of several turns, whose tokens, labels, rewards and failures are checked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file

import deltaw
from deltaw.data.prompts import PromptReader
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.runtime.generation import Drawing, Drawn
from deltaw.serving.rollouts import SessionSampler
from deltaw.task_settings import RewardSettings
from deltaw.training.origin import score_run
from deltaw.training.rollouts.feed import _rollout
from deltaw.training.rollouts.turns import Turns
from tests.byte_models import byte_tokenizer
from tests.conftest import write_rows
from tests.data.chat_templates import tokenizer_of
from tests.training.runs import ADAPTER, Told, held_out_rows, opened

OWN = '''
import os, time
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
class Guess:
    """Asks again until the text is the row's number."""
    def reset(self, row):
        self.wanted, self.count = row["wanted"], 0
        return f"guess below {row['wanted'] + 9}"
    def step(self, text):
        self.count += 1
        right = text == str(self.wanted)
        return f"not {text}", (1.0 if right else -0.1), right
class Plain(Guess):
    def reset(self, row):
        super().reset(row)
class Calls(Guess):
    tools = [TOOL]
    def step(self, text):
        return {"role": "tool", "content": f"sum {text}"}, 0.5, self.count > 99
class Raises(Guess):
    def step(self, text):
        return 1 / 0
class Hangs(Guess):
    def step(self, text):
        time.sleep(60)
class Dies(Guess):
    def step(self, text):
        os._exit(1)
class Nan(Guess):
    def step(self, text):
        return "", float("nan"), False
class Few(Guess):
    def step(self, text):
        return "text"
class Number(Guess):
    def step(self, text):
        return 3, 1, False
class Long(Guess):
    def step(self, text):
        return "x" * (1 << 24), 0, False
class Bytes(Guess):
    def step(self, text):
        return b"text", 0, False
class Vowels:
    def reset(self, row):
        self.count = 0
    def step(self, text):
        self.count += 1
        return "more", sum(c in "aeiou" for c in text) / max(1, len(text)), self.count == 2
'''
SYSTEM = {"role": "system", "content": "Be brief."}


class Script:
    """Samples what a script says, with a log-probability of -1 for each token, and keeps what it was asked."""

    def __init__(self, tokenizer, *turns, end):
        self.tokenizer, self.turns, self.end, self.asked, self.seeds = tokenizer, list(turns), end, [], []

    def __call__(self, prompts, drawing):
        self.asked.append([list(map(int, prompt)) for prompt in prompts])
        self.seeds.append(drawing.seeds)
        texts = self.turns.pop(0)
        found = []
        for text in texts:
            tokens = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
            found.append(Drawn(tokens, text, self.end, np.full(len(tokens), -1.0, np.float32)))
        return found


@pytest.fixture
def play(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    opened = []

    def make(name, rows, *turns, tokenizer=None, ends=True, template="auto", **settings):
        tokenizer = tokenizer or byte_tokenizer()
        path = write_rows(tmp_path / "prompts.jsonl", rows)
        prompts = PromptReader(DataSettings(train=str(path), eval=None, template=template), tokenizer).prepared().train
        end = tokenizer.eos_token if template == "plain" else "<|im_end|>"
        script = Script(tokenizer, *turns, end=tokenizer.convert_tokens_to_ids(end) if ends else None)
        asked = RewardSettings(environment=f"{tmp_path / 'own.py'}:{name}", max_new_tokens=16, **settings)
        turn = Turns(asked, script, Encoder(tokenizer, template), len(tokenizer))
        opened.append(turn)
        prompts = [prompts[place] for place in range(len(prompts))]
        drawn = turn(prompts, Drawing(16, seeds=tuple(range(len(prompts)))))
        return script, prompts, drawn

    yield make
    for turn in opened:
        turn.close()


def texts(tokenizer, tokens) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def test_the_model_and_the_environment_write_by_turns(play):
    rows = [{"prompt": "play", "wanted": 3}, {"prompt": "play on", "wanted": 5}]
    script, prompts, drawn = play("Guess", rows, ["7", "5"], ["3"])
    tokenizer = script.tokenizer
    first = "<|im_start|>user\nguess below 12<|im_end|>\n<|im_start|>assistant\n"
    more = "<|im_end|>\n<|im_start|>user\nnot 7<|im_end|>\n<|im_start|>assistant\n"
    assert [texts(tokenizer, asked) for asked in script.asked[0]] == [first, first.replace("12", "14")]
    assert [texts(tokenizer, asked) for asked in script.asked[1]] == [f"{first}7{more}"]
    assert [one.reward for one in drawn] == pytest.approx([0.9, 1.0])
    assert [one.text for one in drawn] == ["3", "5"] and [one.length for one in drawn] == [3, 1]
    assert script.seeds[0] != script.seeds[1] and len(script.seeds[1]) == 1
    rollout = _rollout(prompts[0], drawn[0])
    assert texts(tokenizer, rollout.tokens) == f"{first}7{more}3<|im_end|>"
    assert texts(tokenizer, rollout.tokens[rollout.is_label]) == "7<|im_end|>3<|im_end|>"
    assert rollout.engine_logprobs.tolist() == pytest.approx([-1, np.nan, -1], nan_ok=True)
    again = Drawn.of_list(json.loads(json.dumps(drawn[0].as_list())))
    assert (
        _rollout(prompts[0], again).is_label.tolist() == rollout.is_label.tolist() and again.reward == drawn[0].reward
    )


def test_without_a_text_of_its_own_the_rows_prompt_is_asked_as_it_is(play):
    rows = [{"messages": [SYSTEM, {"role": "user", "content": "play"}], "wanted": 3}]
    script, prompts, _ = play("Plain", rows, ["3"])
    assert script.asked[0][0] == prompts[0].tokens.tolist()
    script, _, _ = play("Guess", rows, ["3"])  # what it asks takes the place of the last turn
    asked = texts(script.tokenizer, script.asked[0][0])
    assert "Be brief." in asked and "guess below 12" in asked and "play" not in asked


def test_tools_and_their_answers_go_through_the_template(play):
    tokenizer = tokenizer_of("qwen2.5")
    script, prompts, drawn = play(
        "Calls", [{"prompt": "play", "wanted": 3}], ["a"], ["b"], tokenizer=tokenizer, turns=2
    )
    first, second = (texts(tokenizer, asked[0]) for asked in script.asked)
    assert '"name": "add"' in first and second.startswith(f"{first}a<|im_end|>\n")
    assert "<tool_response>\nsum a\n</tool_response>" in second and second.endswith("<|im_start|>assistant\n")
    rollout = _rollout(prompts[0], drawn[0])
    assert texts(tokenizer, rollout.tokens[rollout.is_label]) == "a<|im_end|>b<|im_end|>" and drawn[0].reward == 1


def test_plain_text_goes_on_behind_the_end_token(play):
    script, prompts, drawn = play("Plain", [{"prompt": "play", "wanted": 3}], ["7"], ["3"], template="plain")
    end = script.tokenizer.eos_token
    assert texts(script.tokenizer, _rollout(prompts[0], drawn[0]).tokens) == f"play7{end}not 7\n3{end}"


def test_a_conversation_ends_with_its_turns_its_room_or_an_answer_that_is_cut(play):
    row = [{"prompt": "play", "wanted": 3}]
    script, _, drawn = play("Guess", row, ["1"], ["2"], turns=2)
    assert len(script.asked) == 2 and drawn[0].text == "2" and drawn[0].ended
    script, _, drawn = play("Plain", row, *[["1" * 16]] * 3, turns=3, environment_tokens=20)
    assert len(script.asked) == 1 and drawn[0].ended and drawn[0].length == 16  # a reply takes more than 20 tokens
    script, _, drawn = play("Guess", row, ["1"], turns=3, ends=False)
    assert len(script.asked) == 1 and not drawn[0].ended and drawn[0].reward == pytest.approx(-0.1)
    with pytest.raises(UserError, match="more than there is room for"):
        play("Guess", row, turns=1, environment_tokens=1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Raises", "raised ZeroDivisionError"),
        ("Hangs", "no answer within 1 seconds"),
        ("Dies", "ended its process"),
        ("Nan", "the reward is nan"),
        ("Few", "raised ValueError"),
        ("Number", "step must give a text"),
        ("Long", "gave an answer longer than 16 MiB"),
        ("Bytes", "step must give a text"),
        ("Nothere", "no function 'Nothere'"),
    ],
)
def test_what_goes_wrong_is_named_with_its_row(play, name, said):
    rows = [{"prompt": f"play {n}", "wanted": 3} for n in range(2)]
    with pytest.raises(UserError, match=said) as refused:
        play(name, rows, ["7", "5"], seconds=1)
    assert "own.py" in str(refused.value.where) and "row 1" in str(refused.value.where)


@pytest.mark.parametrize("family", ["chatml", "llama3", "qwen2.5", "qwen3", "gemma3", "mistral3", "phi4", "zephyr"])
def test_what_follows_an_answer_is_what_the_template_writes_there(family):
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, date="2026-01-31")
    asked, reply = [{"role": "user", "content": "first"}], {"role": "user", "content": "second"}
    whole = encoder.prompt([*asked, {"role": "assistant", "content": "yes"}, reply])
    behind = encoder.after_answer(asked, reply)
    assert behind == whole[-len(behind) :] and "second" in texts(tokenizer, behind)
    before = texts(tokenizer, whole[: -len(behind)])
    assert "yes" in before and before.rstrip()[-1] in ">]s"  # the answer's end is the model's to write
    assert "yes" not in texts(tokenizer, behind)


def test_a_run_learns_in_an_environment_and_goes_on_to_the_bit(tmp_path, roomy_folder):
    (tmp_path / "own.py").write_text(OWN)
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(6)])
    own = {"environment": f"{tmp_path / 'own.py'}:Vowels", "turns": 2, "environment_tokens": 60}
    functions = [{"name": "length", "target": 3, "weight": 0.5}]

    def config(output):
        return {
            "model": str(roomy_folder),
            "task": "reward",
            "data": {"train": str(rows), "eval": 2},
            "reward": {**own, "functions": functions, "group": 3, "max_new_tokens": 6},
            "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 0.02, "checkpoint_every": 1},
            "precision": "fp32",
            "output": str(tmp_path / output),
        }

    result = deltaw.fit(config("run"))
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert {"reward Vowels", "reward length"} <= steps[0].keys() and steps[0]["mismatch"] < 1e-5
    for step in steps:
        assert step["reward"] == pytest.approx(step["reward Vowels"] + 0.5 * step["reward length"])
    assert {"reward Vowels", "reward length"} <= result.evaluation.metrics.keys()
    deltaw.fit(config("part"), callback=Told(stop_after=1))
    again = deltaw.fit(resume=str(tmp_path / "part"))
    one, other = (load_file(folder / ADAPTER) for folder in (result.output, again.output))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_folder_from_elsewhere_cannot_name_what_rewards(tmp_path, model_folder):
    code = tmp_path / "own.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{OWN}")
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(6)])
    config = {
        "model": str(model_folder),
        "task": "reward",
        "data": {"train": str(rows), "eval": 2},
        "reward": {"functions": ["lower-case"], "group": 2, "max_new_tokens": 4},
        "train": {"max_steps": 1, "batch_size": 2},
        "output": str(tmp_path / "run"),
    }
    output = deltaw.fit(config).output
    run = opened(output)
    assert score_run(run, held_out_rows(run), sampler=SessionSampler(run)).evaluation.main == "reward"
    saved = (output / "run.yaml").read_text()
    assert "lower-case" in saved
    (output / "run.yaml").write_text(saved.replace("name: lower-case", f"name: {code}:Vowels"))
    run = opened(output)
    with pytest.raises(UserError, match=r"reward\.functions.*nobody has named"):
        score_run(run, held_out_rows(run))
    with pytest.raises(UserError, match=r"reward\.functions.*nobody has named"):
        deltaw.fit(resume=str(output))
    assert not (tmp_path / "ran").exists()
