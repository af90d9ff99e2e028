"""The loop that both kinds of run share: fetch, step, log, evaluate, save.

What a step computes is the trainer's business, what an evaluation is each kind's.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from ostro.errors import OstroError, ToldElsewhere, is_out_of_memory
from ostro.train import metrics, runtime
from ostro.train.options import TrackOptions, TrainOptions
from ostro.train.trainer import Trainer

# What a rank says instead of a signal's number, and above all of them, when a checkpoint could not be written.
_SAVE_FAILED = 1000


def run_steps(
    trainer: Trainer,
    options: TrainOptions,
    track: TrackOptions,
    folder: Path,
    console: Console,
    *,
    stop: runtime.StopRequest,
    before: Callable[[metrics.RunLog, metrics.LiveLine], None],
    evaluate: Callable[[int, metrics.RunLog, metrics.LiveLine], float] | None,
) -> None:
    """Trains to the last step, from wherever the trainer stands.

    Args:
        trainer: Computes and takes the steps.
        options: Periods of the run.
        track: Trackers.
        folder: Run folder.
        console: Where progress is shown.
        stop: Looked at after each step.
        before: Scores the untrained model; called when no step was taken yet.
        evaluate: Scores the model after so many steps, higher is better; None for a run without held-out data.

    Raises:
        Stopped: When a signal asked for a stop; a checkpoint was written.
        OstroError: When a step or an evaluation failed; what was done until then is in a checkpoint.

    Distributed: rank 0 logs and writes while the others wait; all evaluate, and all stop after the same step.
    """
    num_steps, ranks = trainer.num_steps, trainer.ranks
    with (
        metrics.open_log(folder, track, resumed_step=trainer.step, is_main=ranks.is_main) as log,
        metrics.live_line(console, num_steps=num_steps, first_step=trainer.step) as line,
        trainer.saver,
    ):
        if trainer.step == 0:
            trainer.judge(lambda: before(log, line))
        speed = metrics.Throughput(trainer.peak_flops)
        while trainer.step < num_steps:
            is_best, doing = False, "data.micro_batch_tokens"
            try:
                row = trainer.train_step()
                speed.add(row.pop("flops", 0.0), int(row["num_tokens"]))
                line.advance()
                step, last = trainer.step, trainer.step == num_steps
                if step % options.log_every == 0 or last:
                    row |= speed.read()
                    with ranks.agreed():  # rank 0's disk may be full, also where it prints to
                        log.row(step, row)
                        line.show(step, row)
                if evaluate is not None and (last or _due(step, options.evaluate_every)):
                    doing = "evaluate"
                    is_best = trainer.is_best(trainer.judge(partial(evaluate, step, log, line)))
                    speed.restart()
            except (OstroError, OSError, RuntimeError, MemoryError) as error:
                has_no_memory = is_out_of_memory(error)
                if not has_no_memory and not isinstance(error, (OstroError, OSError)):
                    raise
                if ranks.group is not None and has_no_memory:
                    # the other ranks do not know, and wait for this one's gradients: a save would wait for them
                    raise runtime.out_of_memory(doing, error) from error
                path = trainer.save(folder)
                trainer.finish_saving()
                cause = runtime.out_of_memory(doing, error) if has_no_memory else error
                raise runtime.stopped_by(cause, path, trainer.step, num_steps) from error
            number = ranks.maximum(_SAVE_FAILED if trainer.saver.has_failed else stop.signal_number or 0)
            if number == _SAVE_FAILED:
                trainer.finish_saving()
            if last or _due(step, options.save_every) or number or (options.keep_best and is_best):
                path = trainer.save(folder)
            if number or last:
                trainer.finish_saving()
            if number:
                stopped = runtime.stopped_by(signal.Signals(number), path, step, num_steps)
                raise stopped if ranks.is_main else ToldElsewhere(str(stopped))


def _due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
