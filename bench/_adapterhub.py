"""AdapterHub's bottleneck adapter as a peer of the training step, in a process and an environment of its own.

AdapterHub's `adapters` is pinned to transformers 4.57, so that it cannot be imported beside ours. This file is both
ends of a pipe: a client, and, run by the other environment's Python, a worker, which may import nothing of `bench`. A
line is a command, the line that comes back its answer. The worker computes only between a line and its answer, so that
it takes its turn in the rounds like everybody else; it takes the time itself, so that the pipe costs the peer nothing.

SeqBnConfig as it comes normalises twice around the adapter (`original_ln_before`). Here it does not: what is computed
is then exactly the bottleneck after the feed-forward network that the others compute, before the one layer norm.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PYTHON = Path(sys.prefix) / "peers" / "bin" / "python"
"""Made by `make peers`."""
_PAUSE = 0.02
"""OpenMP's idle threads spin for some milliseconds: without this the two processes would take each other's cores."""
_KINDS = {"adapter_down.0.weight": "down", "adapter_down.0.bias": "down_bias",
          "adapter_up.weight": "up", "adapter_up.bias": "up_bias"}  # fmt: skip


class Peer:
    """A worker with its model. job: config (of the BERT, as a dict), state (its weights), trained (name -> values of
    the adapters), batch, labels, gate_rows, dtype, p, reduction_factor and threads.

    Raises ImportError where the environment does not exist, RuntimeError for whatever goes wrong in the worker.
    """

    def __init__(self, job: Mapping[str, Any], python: Path = PYTHON) -> None:
        if not python.is_file():
            raise ImportError(f"AdapterHub has an environment of its own, and {python} is not there: `make peers`")
        self._process = subprocess.Popen(
            [str(python), "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._end = weakref.finalize(self, _end, self._process)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(dict(job), Path(folder) / "job")
            self.versions = self._ask(f"build {folder}/job")

    def step(self) -> tuple[float, float]:
        """Train one step: seconds of forward and of backward."""
        forward, backward = map(float, self._ask("step").split())
        return forward, backward

    def check(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients by name, with dropout off."""
        with tempfile.TemporaryDirectory() as folder:
            self._ask(f"check {folder}/values")
            loss, gradients = torch.load(Path(folder) / "values")
        return loss, gradients

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        word, _, rest = answer.rstrip("\n").partition(" ")
        if word != "ok":
            raise RuntimeError(f"AdapterHub's process: {rest or f'it ended with exit code {self._process.wait()}'}")
        return rest


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


class _Worker:
    """AdapterHub's model, in its own environment."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        import adapters
        from transformers import AutoModelForTokenClassification, BertConfig

        torch.set_num_threads(job["threads"])
        torch.set_float32_matmul_precision("highest")
        model = AutoModelForTokenClassification.from_config(
            BertConfig.from_dict(job["config"]), attn_implementation="sdpa"
        )
        model.load_state_dict(job["state"])
        adapters.init(model)
        config = adapters.SeqBnConfig(
            original_ln_before=False, reduction_factor=job["reduction_factor"], dropout=job["p"]
        )
        model.add_adapter("peer", config=config)
        # Without it the adapter is there and has no part in anything.
        model.set_active_adapters("peer")
        self.model: nn.Module = model.to(job["dtype"]).requires_grad_(False).train()
        self.trained = {name: p for name, p in map(_named, model.named_parameters()) if name}
        if set(self.trained) != set(job["trained"]):
            raise ValueError(f"adapts {sorted(self.trained)}, wanted {sorted(job['trained'])}")
        for name, value in job["trained"].items():
            self.trained[name].requires_grad_().data.copy_(value)
        self.batch, self.labels, self.gate_rows = job["batch"], job["labels"], job["gate_rows"]
        self.versions = f"adapters {adapters.__version__}"

    def forward(self, rows: int | None = None) -> Tensor:
        """The loss of the steps."""
        labels = self.labels[:rows].reshape(-1)
        logits = self.model(**{name: tensor[:rows] for name, tensor in self.batch.items()}).logits
        return F.cross_entropy(logits.reshape(len(labels), -1).float(), labels)

    def step(self) -> str:
        """Seconds of forward and of backward."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        time.sleep(_PAUSE)
        start = time.perf_counter()
        loss = self.forward()
        middle = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        end = time.perf_counter()
        time.sleep(_PAUSE)
        return f"{middle - start} {end - middle}"

    def check(self, path: str) -> None:
        """Save loss and gradients."""
        self.model.eval().zero_grad(set_to_none=True)
        loss = self.forward(self.gate_rows)
        loss.backward()  # type: ignore[no-untyped-call]
        self.model.train()
        torch.save((loss.detach(), {name: p.grad for name, p in self.trained.items()}), path)


def _named(item: tuple[str, nn.Parameter]) -> tuple[str, nn.Parameter]:
    """A parameter of an adapter under the name that every provider shares; "" for one of the base."""
    path, parameter = item
    place, inside, kind = path.partition(".adapters.peer.")
    return f"{place}.dense:{_KINDS[kind]}" if inside else "", parameter


def _serve() -> None:
    # Whatever a library prints goes to stderr; stdout carries answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker: Any = None
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        try:
            if command == "build":
                worker = _Worker(torch.load(path))
                gc.freeze()
                gc.disable()
                answer = worker.versions
            else:
                answer = worker.step() if command == "step" else worker.check(path) or ""
            answers.write(f"ok {answer}\n")
        except Exception as error:
            answers.write(f"error {type(error).__name__}: {' '.join(str(error).split())[:300]}\n")


if __name__ == "__main__":
    _serve()
