"""How a stage runs on Ray Train: workers of any number, our own checkpoints, stops, and failures said once."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from transformers.utils.logging import disable_progress_bar

from diagonal.config import TrainConfig
from diagonal.errors import FieldError, require
from diagonal.storage import StorageError
from diagonal.training.checkpoint import CheckpointError
from diagonal.training.distributed import GROUP_LOST
from diagonal.training.loop import Stopped, TooManyNonFiniteError
from jobs.ray_cluster import connect
from jobs.runs.console import Bar, has_bar
from jobs.runs.run import JobFailed, JobStopped, Run, say
from jobs.workers.cluster_room import training_needs, wait_for_room
from jobs.workers.control import Failure, start_controller
from jobs.workers.data_feed import Feed
from jobs.workers.worker import Worker

FINAL = (FieldError, CheckpointError, StorageError, TooManyNonFiniteError)  # the same would come again
MOST_CHARACTERS = 600
BAR_EVERY_S = 0.5
FIRST_OF_ALL_SHARE = 0.8  # of the stall timeout: what replaces a worker with a reason comes before the watchdog
FOLLOWS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out",
    "timed out",
    "Broken pipe",
    GROUP_LOST,  # by its words, as Ray wraps what a worker raised
)


def fit_stage(run: Run, stage: str, body: Callable[[Worker, Feed], None], feed: Feed) -> None:
    """Run `body` on every worker until it ends; a stage that was cut off goes on from its newest whole checkpoint.

    Lost and stalled workers are replaced, `train.max_failures` times. Raises `JobFailed` with the cause where that is
    not enough, the error itself where no restart would mend it, `JobStopped` after SIGTERM.
    """
    connect()
    wait_for_room(training_needs(run.config), run.config.train.nodes_wait_s)
    config, control = run.config.train, start_controller()
    settings = {**run.to_settings(), "stage": stage, "control": control, "feed": ray.put(feed), "body": body}
    settings["has_bar"] = has_bar()
    say(f"{stage}: {feed.updates} updates of {feed.batch_size} samples on {_workers(config)} workers")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.stall_timeout_s * FIRST_OF_ALL_SHARE)
    with tempfile.TemporaryDirectory(prefix="diagonal-train-") as scratch, _stopping(control, stage) as stopped:
        try:
            with _bar(control, stage):
                _trainer(run, stage, settings, scratch).fit()
        except ray.train.TrainingFailedError as error:
            _raise_final(control)
            raise JobFailed(_account(stage, error, run)) from None
        _raise_final(control)
        if stopped.is_set():
            raise JobStopped(f"{stage}: stopped as asked, its checkpoint is whole; {run.resume_hint}")


def _trainer(run: Run, stage: str, settings: dict[str, Any], scratch: str) -> TorchTrainer:
    config, timeout_s = run.config.train, run.config.train.stall_timeout_s * FIRST_OF_ALL_SHARE
    backend = "cpu:gloo,cuda:nccl" if config.gpus_per_worker else "gloo"
    elastic = config.fewest_workers < config.workers
    return TorchTrainer(
        run_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend=backend, timeout_s=max(1, int(timeout_s))),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # as below
            num_workers=(config.fewest_workers, config.workers) if elastic else config.workers,  # type: ignore[arg-type]
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker},
            label_selector={"pool": config.pool} if config.pool else None,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # at import Ray swaps in the class of Train V2
            name=f"{run.name}-{stage}",
            storage_path=scratch,  # checkpoints are our own: Ray keeps a marker there
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},  # else every line comes twice
            logging_config=LoggingConfig(log_level="CRITICAL"),  # its files have all; here each failure is said once
            callbacks=[SayFailures(stage)],  # type: ignore[list-item]
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def run_worker(settings: dict[str, Any]) -> None:
    """One rank of a stage, as Ray Train starts it."""
    control = settings["control"]
    if ray.get(control.failure.remote()) is not None:
        return  # a restart cannot mend it: the job says so
    _quiet()
    feed: Feed = ray.get(settings["feed"])
    with Worker.join(settings) as worker:
        try:
            worker.check_memory()
            settings["body"](worker, feed)
        except Stopped as stopped:
            if worker.place.rank == 0:
                say(f"{worker.place.stage}: {stopped}, which is saved")
        except Exception as error:  # edge: said here with its traceback, unless it follows from another rank's
            if isinstance(error, FINAL):
                ray.get(control.fail.remote(Failure(error, worker.place.rank, traceback.format_exc())))
            elif not _follows(error):
                traceback.print_exc()
            raise


def _quiet() -> None:
    """Leave a worker's output to what it says of training."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train writes each report at INFO, under a name of its own
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    disable_progress_bar()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing writes to it


@contextmanager
def _stopping(control: Any, stage: str) -> Iterator[threading.Event]:
    """While a stage runs, SIGTERM asks its workers to save and stop; the event says whether it came."""
    asked, ended = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.set()

    def tell() -> None:
        asked.wait()
        if not ended.is_set():
            say(f"{stage}: asked to stop; saving after this update")
            ray.get(control.stop.remote())

    before = signal.signal(signal.SIGTERM, on_signal) if _is_main_thread() else None
    messenger = threading.Thread(target=tell, name="stop", daemon=True)  # a signal's handler must not call Ray
    messenger.start()
    try:
        yield asked
    finally:
        ended.set()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _bar(control: Any, stage: str) -> Iterator[None]:
    """On a terminal: a bar that shows while a stage runs how far it has come."""
    if not has_bar():
        yield
        return
    bar, ended = Bar(stage), threading.Event()

    def follow() -> None:
        while not ended.wait(BAR_EVERY_S):
            try:
                position = ray.get(control.position.remote(), timeout=BAR_EVERY_S)
            except (RayError, TimeoutError):
                continue  # the actor is restarting: the next look shows more
            if position is not None:
                bar.show(position)

    follower = threading.Thread(target=follow, name="bar", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
        bar.close()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise_final(control: Any) -> None:
    """Raise the error that ended the stage, if a worker reported one."""
    try:
        failure: Failure | None = ray.get(control.failure.remote(), timeout=30.0)
    except (RayError, TimeoutError):
        return
    if failure is not None:
        say(f"rank {failure.rank}:\n{failure.traceback}")
        raise failure.error


def _account(stage: str, error: Exception, run: Run) -> str:
    """How a stage failed, and how to go on."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    said = first_cause(failures) if failures else str(error)
    limit = run.config.train.max_failures
    return f"{stage} failed, and train.max_failures = {limit} are used up: {said}\n{run.resume_hint}"


def first_cause(failures: Mapping[int, Exception]) -> str:
    """One account of what failed on some ranks: an error that is no mere consequence of another's comes first."""
    order = sorted(failures.items(), key=lambda item: (_follows(item[1]), item[0]))
    rank, cause = order[0]
    others = f"; then ranks {', '.join(str(other) for other, _ in order[1:])}" if len(order) > 1 else ""
    words = " ".join(line.strip() for line in str(cause).splitlines() if line.strip())
    return f"rank {rank}: {type(cause).__name__}: {words[:MOST_CHARACTERS]}{others}"


def _follows(error: Exception) -> bool:
    return any(word in str(error) for word in FOLLOWS)


class SayFailures(UserCallback):
    """Says in one line what ended the workers, each time: Ray's own account has every rank's whole traceback."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        say(f"{self._stage}: workers failed: {first_cause(worker_exceptions)}")


def _workers(config: TrainConfig) -> str:
    fewest, most = config.fewest_workers, config.workers
    return f"{fewest} to {most}" if fewest < most else str(most)


def check_batch(batch_size: int, workers: int, field: str) -> None:
    """Refuse a global batch that leaves a worker without samples."""
    require(batch_size >= workers, field, batch_size, f"at least train.workers = {workers}")
