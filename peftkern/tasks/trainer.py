"""`transformers.Trainer` with checkpoints that hold only what trains, and with the loss of prompt-based tuning."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

import peftkern as pk
from peftkern.checkpoint import restore
from peftkern.tasks.encode import Encoded
from peftkern.tasks.objective import PromptObjective
from peftkern.tasks.settings import METRICS, OPTIMIZERS, TrainSettings
from peftkern.tasks.task import Task

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"


class AdapterTrainer(Trainer):
    """The Trainer, but a checkpoint is what `pk.save` writes: adapter and trained modules, no frozen weight.

    Resuming and restoring the best checkpoint put those weights into the model that is there. `objective`, if given,
    makes loss and scores in place of the model's own.
    """

    objective: PromptObjective | None = None
    model: Any

    @property
    def adapted(self) -> nn.Module:
        """The model that adapters are attached to."""
        model: nn.Module = self.model
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss where there is one, scaled over accumulated batches just when the model's would be."""
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = num_items_in_batch if self.model_accepts_loss_kwargs else None
        loss, scores = self.objective(model, inputs, count, train=not return_outputs)
        return (loss, {"loss": loss, "logits": scores}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; there is no other format."""
        if self.args.should_save:
            pk.save(self.adapted, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(self.adapted if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore(self.adapted, Path(str(self.state.best_model_checkpoint)))


class StepClock(TrainerCallback):
    """Seconds spent in training steps (forward, backward, optimizer), evaluation and saving left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self._start = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop."""
        self.seconds += _now() - self._start
        self.steps += 1


def make_trainer(
    settings: TrainSettings, task: Task, model: Any, train: Encoded | None, dev: Encoded, folder: Path
) -> tuple[AdapterTrainer, StepClock]:
    """The Trainer for one run (or, without `train`, for evaluation only) and the clock of its steps."""
    clock = StepClock()
    callbacks: list[TrainerCallback] = [clock]
    if train is not None and settings.patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
    if train is not None and "tensorboard" in settings.report_to:
        from torch.utils.tensorboard import SummaryWriter

        board: Any = TensorBoardCallback
        callbacks.append(board(SummaryWriter(str(folder / TENSORBOARD))))
    trainer = AdapterTrainer(
        model=model,
        args=arguments(settings, folder, len(train.rows) if train is not None else 0),
        data_collator=task.collator,
        train_dataset=train.rows if train is not None else None,
        eval_dataset=dev.rows,
        processing_class=task.tokenizer,
        compute_metrics=task.scorer(dev),
        preprocess_logits_for_metrics=best_class,
        callbacks=callbacks,
    )
    trainer.objective = task.objective
    trainer.remove_callback(PrinterCallback)  # what takes the progress bar's place where that is off: a line per log
    return trainer, clock


def arguments(settings: TrainSettings, folder: Path, records: int) -> TrainingArguments:
    """The settings in the words of transformers, for so many training records; 0 is evaluation only."""
    training = records > 0
    strategy = ("steps" if settings.eval_steps else "epoch") if training else "no"
    steps = math.ceil(math.ceil(records / settings.batch_size) / settings.accumulate) * settings.epochs
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup if settings.warmup < 1 else int(settings.warmup),
        optim=OPTIMIZERS[settings.optimizer],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        **_checkpointing(settings),
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,  # the order of batches depends on nothing but the seed, so methods see the same ones
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=settings.eval_steps or None,
        save_steps=settings.eval_steps or 500,
        save_total_limit=1,
        load_best_model_at_end=training,
        metric_for_best_model=settings.metric or METRICS[settings.task][0],
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_strategy="steps",
        logging_steps=max(1, int(steps / 50)),
        disable_tqdm=not settings.progress,
        report_to=[tracker for tracker in settings.report_to if tracker != "tensorboard"] if training else [],
        run_name=folder.name,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _checkpointing(settings: TrainSettings) -> dict[str, Any]:
    """The option's name as the installed transformers has it: 5.2x renamed `gradient` to `activation`."""
    known = {option.name for option in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if settings.gradient_checkpointing else {}


@contextmanager
def tracked(settings: TrainSettings) -> Iterator[None]:
    """Close the W&B run that training opens, as failed after an error; a run that the caller has open stays open.

    W&B keeps one run per process: without this the next seed would be logged into the run of the one before.
    """
    if "wandb" not in settings.report_to:
        yield
        return
    wandb = importlib.import_module("wandb")
    if wandb.run is not None:
        yield
        return
    failed = True
    try:
        yield
        failed = False
    finally:
        wandb.finish(exit_code=int(failed))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = [path for path in (folder / CHECKPOINTS).glob("checkpoint-*") if _is_complete(path)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    # The Trainer writes its state last, and in place: a run that is killed meanwhile leaves a part of it.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def best_class(logits: Tensor | Sequence[Tensor], _labels: Tensor) -> Tensor:
    """Logits [..., C] to class numbers, on the device, so that evaluation never gathers logits."""
    scores = logits if isinstance(logits, Tensor) else logits[0]
    return scores.argmax(-1)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
