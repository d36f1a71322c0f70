"""The view of a training run: what a terminal shows, and what a log file gets."""

import io

import pytest
from rich.console import Console

from qmprop.evaluation import PAPER_MAE
from qmprop.learning import EpochResult
from qmprop.monitor import TrainingMonitor, describe, draw
from qmprop.targets import DEFAULT_KEYS, TARGETS


def epoch(number, epochs=100):
    mae = {key: PAPER_MAE[key] * (1 + epochs / number) for key in DEFAULT_KEYS}
    return EpochResult(
        epoch=number,
        epochs=epochs,
        loss=0.5 / number,
        mae=mae,
        others={"mmff": {key: 2.0 * value for key, value in mae.items()}},
        molecules_per_second=640.0,
        peak_share=0.4,
        seconds=156.0,
        seconds_left=156.0 * (epochs - number),
    )


def watch(width, *, terminal, count=12):
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None, highlight=False)
    with TrainingMonitor(console) as monitor:
        monitor.load(4096, 130831)
        for number in range(1, count + 1):
            monitor.step(number * 10, 1000, 0.25)
            monitor.epoch(epoch(number))
    return stream.getvalue()


@pytest.mark.parametrize(("width", "columns"), [(60, 3), (80, 6), (200, 12)])
def test_a_terminal_shows_as_many_of_the_last_epochs_as_fit(width, columns):
    stream = io.StringIO()
    results = [epoch(number) for number in range(1, 13)][-columns:]
    Console(file=stream, width=width, color_system=None).print(draw(results))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in stream.getvalue()
    for key in DEFAULT_KEYS:
        (line,) = [line for line in lines if line.split() and line.split()[0] == key]
        assert f"{results[-1].mae[key]:.3g}" in line
        assert TARGETS[key].evaluation_unit in line


def test_a_terminal_shows_steps_loss_and_the_time_left():
    text = watch(80, terminal=True)
    assert "120/1000" in text
    assert "loss 0.2500" in text
    assert "640 molecules/s, 3:48:48 left" in text


def test_a_log_file_gets_one_line_an_epoch():
    lines = watch(80, terminal=False).splitlines()
    assert lines == [describe(epoch(number)) for number in range(1, 13)]
    assert "epoch 12/100: loss 0.0417" in lines[-1]
    assert "gap 448 meV" in lines[-1]
