"""Environments: tokens, labels, rewards and errors of multi-turn conversations."""

from __future__ import annotations

import json

import numpy as np
import pytest

import deltaw
from deltaw.data.prompts import PromptReader
from deltaw.data.templates import Encoder
from deltaw.decoding.generation import SampledCompletion, SamplingParams
from deltaw.settings.data import DataSettings
from deltaw.tasks.reward.feed import MultiTurnSampler, RewardFeed
from deltaw.tasks.reward.settings import RewardSettings
from tests.byte_models import byte_tokenizer
from tests.conftest import refusal, write_rows
from tests.data.chat_templates import tokenizer_of
from tests.training.runs import ADAPTER, load_eval_rows, metrics, open_on_cpu, slow_except, stopped_run

ENVIRONMENTS = '''
import os, time
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
class Guess:
    """Repeats the question until the text is the row's number."""
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
    """Sampler with scripted texts and a log-probability of -1 per token. Records the prompts."""

    def __init__(self, tokenizer, *turns, end):
        self.tokenizer = tokenizer
        self.turns = list(turns)
        self.end = end
        self.prompts = []
        self.seeds = []

    def __call__(self, prompts, params):
        self.prompts.append([list(map(int, prompt)) for prompt in prompts])
        self.seeds.append(params.seeds)
        texts = self.turns.pop(0)
        completions = []
        for text in texts:
            tokens = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
            completions.append(SampledCompletion(tokens, text, self.end, np.full(len(tokens), -1.0, np.float32)))
        return completions


@pytest.fixture
def play(tmp_path):
    (tmp_path / "own.py").write_text(ENVIRONMENTS)
    samplers = []

    def make(name, rows, *turns, tokenizer=None, end_token=True, template="auto", **settings):
        tokenizer = tokenizer or byte_tokenizer()
        path = write_rows(tmp_path / "prompts.jsonl", rows)
        prompts = PromptReader(DataSettings(train=str(path), eval=None, template=template), tokenizer).prepare().train
        end = tokenizer.eos_token if template == "plain" else "<|im_end|>"
        script = Script(tokenizer, *turns, end=tokenizer.convert_tokens_to_ids(end) if end_token else None)
        reward_settings = RewardSettings(environment=f"{tmp_path / 'own.py'}:{name}", max_new_tokens=16, **settings)
        sampler = MultiTurnSampler(reward_settings, script, Encoder(tokenizer, template), len(tokenizer))
        samplers.append(sampler)
        prompts = [prompts[index] for index in range(len(prompts))]
        completions = sampler(prompts, SamplingParams(16, seeds=tuple(range(len(prompts)))))
        return script, prompts, completions

    yield make
    for sampler in samplers:
        sampler.close()


def texts(tokenizer, tokens) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def rollout_of(prompt, completion):
    """Return the row that the training gets for a completion."""
    return RewardFeed.complete(object.__new__(RewardFeed), prompt, completion)


def test_model_and_environment_alternate(play):
    rows = [{"prompt": "play", "wanted": 3}, {"prompt": "play on", "wanted": 5}]
    script, prompts, completions = play("Guess", rows, ["7", "5"], ["3"])
    tokenizer = script.tokenizer
    first = "<|im_start|>user\nguess below 12<|im_end|>\n<|im_start|>assistant\n"
    reply = "<|im_end|>\n<|im_start|>user\nnot 7<|im_end|>\n<|im_start|>assistant\n"
    assert [texts(tokenizer, prompt) for prompt in script.prompts[0]] == [first, first.replace("12", "14")]
    assert [texts(tokenizer, prompt) for prompt in script.prompts[1]] == [f"{first}7{reply}"]
    assert [completion.reward for completion in completions] == pytest.approx([0.9, 1.0])
    assert [(completion.text, completion.length) for completion in completions] == [("3", 3), ("5", 1)]
    assert script.seeds[0] != script.seeds[1] and len(script.seeds[1]) == 1
    rollout = rollout_of(prompts[0], completions[0])
    assert texts(tokenizer, rollout.tokens) == f"{first}7{reply}3<|im_end|>"
    assert texts(tokenizer, rollout.tokens[rollout.is_label]) == "7<|im_end|>3<|im_end|>"
    assert rollout.engine_logprobs.tolist() == pytest.approx([-1, np.nan, -1], nan_ok=True)
    restored = SampledCompletion.from_list(json.loads(json.dumps(completions[0].as_list())))
    assert rollout_of(prompts[0], restored).is_label.tolist() == rollout.is_label.tolist()
    assert restored.reward == completions[0].reward


def test_environment_without_text_uses_the_row_prompt(play):
    rows = [{"messages": [SYSTEM, {"role": "user", "content": "play"}], "wanted": 3}]
    script, prompts, _ = play("Plain", rows, ["3"])
    assert script.prompts[0][0] == prompts[0].tokens.tolist()
    script, _, _ = play("Guess", rows, ["3"])  # the environment's text replaces the last turn
    prompt = texts(script.tokenizer, script.prompts[0][0])
    assert "Be brief." in prompt and "guess below 12" in prompt and "play" not in prompt


def test_tools_and_tool_replies_are_rendered_by_the_template(play):
    tokenizer = tokenizer_of("qwen2.5")
    rows = [{"prompt": "play", "wanted": 3}]
    script, prompts, completions = play("Calls", rows, ["a"], ["b"], tokenizer=tokenizer, turns=2)
    first, second = (texts(tokenizer, requests[0]) for requests in script.prompts)
    assert '"name": "add"' in first and second.startswith(f"{first}a<|im_end|>\n")
    assert "<tool_response>\nsum a\n</tool_response>" in second and second.endswith("<|im_start|>assistant\n")
    rollout = rollout_of(prompts[0], completions[0])
    assert texts(tokenizer, rollout.tokens[rollout.is_label]) == "a<|im_end|>b<|im_end|>" and completions[0].reward == 1


def test_plain_text_continues_after_the_end_token(play):
    script, prompts, completions = play("Plain", [{"prompt": "play", "wanted": 3}], ["7"], ["3"], template="plain")
    end = script.tokenizer.eos_token
    assert texts(script.tokenizer, rollout_of(prompts[0], completions[0]).tokens) == f"play7{end}not 7\n3{end}"


def test_conversation_ends_at_turn_token_or_completion_limit(play):
    row = [{"prompt": "play", "wanted": 3}]
    script, _, completions = play("Guess", row, ["1"], ["2"], turns=2)
    assert len(script.prompts) == 2 and completions[0].text == "2" and completions[0].ended
    script, _, completions = play("Plain", row, *[["1" * 16]] * 3, turns=3, environment_tokens=20)
    # A reply takes more than 20 tokens.
    assert len(script.prompts) == 1 and completions[0].ended and completions[0].length == 16
    script, _, completions = play("Guess", row, ["1"], turns=3, end_token=False)
    assert len(script.prompts) == 1 and not completions[0].ended and completions[0].reward == pytest.approx(-0.1)
    refusal(play, "Guess", row, turns=1, environment_tokens=1, match="leaves too few")


FAULTS = [("Raises", "raised ZeroDivisionError"), ("Hangs", "no answer within 1 seconds")]
FAULTS += [("Dies", "its process exited"), ("Nan", "the reward is nan"), ("Few", "raised ValueError")]
FAULTS += [("Number", "step must return a text"), ("Long", "gave an answer longer than 16 MiB")]
FAULTS += [("Bytes", "step must return a text"), ("Nothere", "no function 'Nothere'")]


# Rewards and environments run in the same kind of process. tests/training/test_rewards.py tests its other faults.
QUICK = ("Raises", "Hangs", "Nan", "Few", "Number")


@pytest.mark.parametrize(("name", "message"), slow_except(*QUICK, names=FAULTS))
def test_environment_errors_name_the_row(play, name, message):
    rows = [{"prompt": f"play {n}", "wanted": 3} for n in range(2)]
    error = refusal(play, name, rows, ["7", "5"], seconds=1, match=message)
    assert "own.py" in str(error.location) and "row 1" in str(error.location)


@pytest.mark.parametrize("family", ["chatml", "llama3", "qwen2.5", "qwen3", "gemma3", "mistral3", "phi4", "zephyr"])
def test_encoded_reply_matches_the_template(family):
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, date="2026-01-31")
    question = [{"role": "user", "content": "first"}]
    reply = {"role": "user", "content": "second"}
    full_prompt = encoder.prompt([*question, {"role": "assistant", "content": "yes"}, reply])
    suffix = encoder.encode_reply(question, reply)
    assert suffix == full_prompt[-len(suffix) :] and "second" in texts(tokenizer, suffix)
    before = texts(tokenizer, full_prompt[: -len(suffix)])
    assert "yes" in before and before.rstrip()[-1] in ">]s"  # the model generates the end of the answer
    assert "yes" not in texts(tokenizer, suffix)


@pytest.mark.slow
def test_environment_run_trains_and_resumes_bit_identically(tmp_path, long_context_folder):
    (tmp_path / "own.py").write_text(ENVIRONMENTS)
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(6)])
    environment = {"environment": f"{tmp_path / 'own.py'}:Vowels", "turns": 2, "environment_tokens": 60}
    reward = {"functions": [{"name": "length", "target": 3, "weight": 0.5}], "group": 3, "max_new_tokens": 6}
    train = {"max_steps": 2, "batch_size": 2, "learning_rate": 0.02, "checkpoint_every": 1, "drift": False}
    config = {"model": str(long_context_folder), "task": "rl", "data": {"train": str(rows), "eval": 2}}
    config |= {"reward": {**environment, **reward}, "train": train, "precision": "fp32"}
    result = deltaw.fit({**config, "output": str(tmp_path / "run")})
    steps = metrics(result.output, "loss")
    assert {"reward Vowels", "reward length"} <= steps[0].keys() and steps[0]["mismatch"] < 1e-5
    for step in steps:
        assert step["reward"] == pytest.approx(step["reward Vowels"] + 0.5 * step["reward length"])
    assert {"reward Vowels", "reward length"} <= result.evaluation.metrics.keys()
    resumed = deltaw.fit(resume=stopped_run({**config, "output": str(tmp_path / "part")}, 1))
    assert (result.output / ADAPTER).read_bytes() == (resumed.output / ADAPTER).read_bytes()


def test_untrusted_folder_cannot_name_reward_functions(tmp_path, model_folder):
    code = tmp_path / "own.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{ENVIRONMENTS}")
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(6)])
    config = {"model": str(model_folder), "task": "rl", "data": {"train": str(rows), "eval": 2}}
    config |= {"reward": {"functions": ["lower-case"], "group": 2, "max_new_tokens": 4}, "precision": "fp32"}
    config |= {"train": {"max_steps": 1, "batch_size": 2}, "output": str(tmp_path / "run")}
    output = deltaw.fit(config).output
    run = open_on_cpu(output)
    assert run.score(load_eval_rows(run)).evaluation.main == "reward"
    saved = (output / "run.yaml").read_text()
    assert "lower-case" in saved
    (output / "run.yaml").write_text(saved.replace("name: lower-case", f"name: {code}:Vowels"))
    run = open_on_cpu(output)
    refusal(run.score, load_eval_rows(run), match=r"reward\.functions.*not named")
    refusal(deltaw.fit, resume=str(output), match=r"reward\.functions.*not named")
    assert not (tmp_path / "ran").exists()
