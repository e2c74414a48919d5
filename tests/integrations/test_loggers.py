"""The Trainer's loggers get the same numbers as the history, and the ranks as a picture."""

import json

import pytest
from test_trainer import MAX_STEPS, trainer_for
from transformers import TrainerCallback

import adalora
from adalora.integrations.loggers import PHASES, PICTURES
from helpers.oldest import needs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Of the loggers' own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

from test_trainer import base  # noqa: E402, F401


def train(base, folder, **settings):  # noqa: F811
    callback = adalora.AdaLoraCallback(target_rank=2, allocation_interval=1)
    trainer = trainer_for(base, folder, callback, save_strategy="no", **settings)
    trainer.train()
    return callback.controller, trainer


def expected(controller):
    """Step of the log -> the four numbers, from the history alone."""
    history, wanted = controller.history, {}
    for record in history.of("step"):
        if "loss" not in record:
            continue
        before = [r for r in history.of("allocation") if r["step"] <= record["step"]]
        values = {
            "adalora/budget": record["budget"],
            "adalora/live": record["live"],
            "adalora/phase": PHASES.index(record["phase"]),
            **({"adalora/orthogonality": before[-1]["orthogonality"]} if before else {}),
        }
        wanted[record["step"] + 1] = values
    assert len(wanted) == MAX_STEPS // 4
    return wanted


@needs("tensorboard")
def test_tensorboard(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    controller, _ = train(base, tmp_path, report_to=["tensorboard"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    wanted = expected(controller)
    for name in ("budget", "live", "phase", "orthogonality"):
        found = {e.step: e.value for e in board.Scalars(f"train/adalora/{name}")}
        key = f"adalora/{name}"
        assert found == pytest.approx({step: v[key] for step, v in wanted.items() if key in v})
    pictures = board.Images("adalora/ranks")
    assert 2 <= len(pictures) <= PICTURES + 1
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")
    assert pictures[0].width > 200
    assert pictures[0].encoded_image_string != pictures[-1].encoded_image_string


@needs("wandb")
def test_wandb_offline(base, tmp_path, monkeypatch):  # noqa: F811
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = []
    real = wandb.Image
    monkeypatch.setattr(wandb, "Image", lambda pixels: seen.append(pixels.shape) or real(pixels))
    controller, _ = train(base, tmp_path, report_to=["wandb"])
    summary = dict(wandb.run.summary)
    wandb.finish()
    last = expected(controller)[MAX_STEPS]
    for name, value in last.items():
        assert summary[f"train/{name}"] == pytest.approx(value)
    assert len(seen) >= 2
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/adalora/ranks*.png"))) == len(seen)


@needs("mlflow")
def test_mlflow_local(base, tmp_path, monkeypatch):  # noqa: F811
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    controller, _ = train(base, tmp_path, report_to=["mlflow"])
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    wanted = expected(controller)
    live = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "adalora/live")}
    assert live == {step: values["adalora/live"] for step, values in wanted.items()}
    assert len(client.list_artifacts(run.info.run_id, "adalora")) >= 2


@needs("trackio")
def test_trackio_local(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio

    logged = []
    real = trackio.log
    monkeypatch.setattr(trackio, "log", lambda metrics, **more: logged.append(metrics) or real(metrics, **more))
    controller, _ = train(base, tmp_path, report_to=["trackio"], project="adalora", trackio_static_space_id=False)
    wanted = expected(controller)
    found = {m["train/global_step"]: m["train/adalora/live"] for m in logged if "train/adalora/live" in m}
    assert found == {step: values["adalora/live"] for step, values in wanted.items()}
    assert sum(isinstance(m.get("adalora/ranks"), trackio.Image) for m in logged) >= 2


class Recorder(TrainerCallback):
    """A logger that takes no pictures."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **json.loads(json.dumps(logs))})


def test_any_logger_gets_the_numbers(base, tmp_path):  # noqa: F811
    """One that was added before adalora's callback, too."""
    recorder, callback = Recorder(), adalora.AdaLoraCallback(target_rank=2, allocation_interval=1)
    trainer = trainer_for(base, tmp_path, recorder, callback, save_strategy="no")
    trainer.train()
    found = {
        log["step"]: {k: v for k, v in log.items() if k.startswith("adalora/")}
        for log in recorder.logs
        if "adalora/live" in log
    }
    assert found == expected(callback.controller)
    trainer.train()  # the second run adds nothing: the adapter is finished
    assert sum("adalora/live" in log for log in recorder.logs) == len(found)


def test_a_logger_that_fails_does_not_end_the_training(base, tmp_path, monkeypatch):  # noqa: F811
    class TensorBoardCallback(TrainerCallback):
        class tb_writer:
            @staticmethod
            def add_figure(*_):
                raise OSError("disk full")

    callback = adalora.AdaLoraCallback(target_rank=2)
    trainer = trainer_for(base, tmp_path, callback, TensorBoardCallback(), save_strategy="no")
    with pytest.warns(adalora.AdaLoraWarning, match="disk full"):
        trainer.train()
    assert callback.controller.finished
