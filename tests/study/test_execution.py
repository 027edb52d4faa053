"""Workers that share the folder of a study."""

import io
import threading
from concurrent.futures import Future
from dataclasses import replace

import pytest
from rich.console import Console
from test_locks import is_locked
from test_runs import TINY, made_up

from vmoe_routers.checkpoints import from_pretrained
from vmoe_routers.study import Variant, execution
from vmoe_routers.study.jobs import Job, Timing
from vmoe_routers.study.kept import kept_model
from vmoe_routers.study.locks import locked
from vmoe_routers.study.records import run_path, timing_path
from vmoe_routers.training import Augmentation
from vmoe_routers.training.subject import known_augmentation

pytestmark = pytest.mark.usefixtures("one_thread")


class Queue(list):
    put = list.append

    def empty(self):
        return not self

    def get(self):
        return self.pop()


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes the state of a worker process, and a job for the worker."""
    settings, data = replace(TINY, epochs=1, output=tmp_path), (made_up(), None)
    monkeypatch.setattr(execution, "_worker", {"settings": settings, "data": data, "finished": Queue()})
    return settings, Job(Variant(), 0, run_path(settings, "inputs", Variant(), 0))


def test_a_run_of_another_process_is_left_to_it(worker, monkeypatch):
    settings, job = worker
    with locked(job.path):
        assert execution._work(job) == (False, None) and not job.path.exists()
    done, record = execution._work(job)
    assert done and job.read(settings, None) == record and not is_locked(job.path)
    monkeypatch.setattr(execution, "run", None)  # the record exists, so nothing is run
    assert execution._work(job) == (True, None)


def test_a_damaged_record_is_run_again(worker):
    settings, job = worker
    job.path.parent.mkdir()
    job.path.write_text("{")
    assert execution._work(job)[1] is not None and job.read(settings, None) is not None


def test_a_record_without_its_model_is_run_again(worker, monkeypatch):
    settings, job = worker
    execution._work(job)
    settings = replace(settings, save_models=True)
    monkeypatch.setitem(execution._worker, "settings", settings)
    assert job.read(settings, None) is None
    folder = job.model_folder(settings)
    assert execution._work(job)[1] is not None and (folder / "model.safetensors").exists()
    prepared, _ = known_augmentation(str(folder), from_pretrained(folder), False, Augmentation())
    assert (prepared.normalization, prepared.crop_pct) == ("none", 1.0)
    assert job.read(settings, None) is not None and kept_model(job.path)[0] == folder


def test_the_timing_of_another_process_is_left_to_it(worker, monkeypatch):
    settings, _ = worker
    timing = Timing([Variant()], timing_path(settings, "inputs", [Variant()]))
    with locked(timing.path):
        assert execution._time(timing) == (False, None)
    assert execution._time(timing) == (True, None) and timing.read() is not None
    monkeypatch.setattr(execution, "time_steps", None)
    assert execution._time(timing) == (True, None)


def test_waits_for_the_runs_of_another_process(monkeypatch):
    monkeypatch.setattr(execution, "POLL", 0.0)
    answers = {"a": [(True, None)], "b": [(False, None), (False, None), (True, None)]}
    console = Console(file=io.StringIO(), width=100)

    def submit(work, job):
        future = Future()
        threading.Timer(0.0, lambda: future.set_result(answers[job].pop(0))).start()
        return future

    execution._finish(submit, None, ["a", "b"], Queue(), lambda: None, console)
    assert answers == {"a": [], "b": []}
    assert console.file.getvalue() == "waiting for another process, which is running 1 of the runs\n"


def test_an_error_of_a_run_is_raised():
    def submit(work, job):
        future = Future()
        future.set_exception(OSError("no space"))
        return future

    with pytest.raises(OSError, match="no space"):
        execution._finish(submit, None, ["a"], Queue(), lambda: None, Console(file=io.StringIO()))
