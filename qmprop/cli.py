"""The commands: parse, call one verb of the library, show the result, return the exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from qmprop.errors import QmpropError, UsageError

if TYPE_CHECKING:
    from qmprop.config import TrainConfig
    from qmprop.records import Record
    from qmprop.writers import Output, Writer

OK: Final = 0
SOME_RECORDS_FAILED: Final = 3

DEFAULT_WEIGHTS: Final = "egnn-qm9"

app = typer.Typer(
    name="qmprop",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

WeightsOption = Annotated[
    str, typer.Option("-w", "--weights", metavar="NAME|PATH", help="Bundled weights or a weights file.")
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")]
DataOption = Annotated[
    str, typer.Option("--data", metavar="qm9|FILE", help="QM9, its cache file, or a labeled .extxyz.")
]


def _show_version(asked: bool) -> None:
    if asked:
        from qmprop import __version__

        typer.echo(f"qmprop {__version__}")
        raise typer.Exit


@app.callback()
def _qmprop(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Predict twelve quantum-chemical properties of small organic molecules.

    A graph neural network (EGNN), trained on QM9, answers in milliseconds what B3LYP/6-31G(2df,p) would:
    for neutral, closed-shell molecules of H, C, N, O and F with up to nine heavy atoms.

    Start with: qmprop predict molecule.xyz
    """


@app.command()
def predict(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Files, folders, globs, or - for standard input.", show_default=False),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "-f", "--format", metavar="FORMAT", help="table, csv, json or jsonl; else by OUTPUT's suffix, else table."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write to FILE, replaced at the end in one step."),
    ] = None,
    properties: Annotated[
        list[str] | None,
        typer.Option("-p", "--properties", metavar="KEYS", help="For instance mu,homo,u0_atom; else all twelve."),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option("-u", "--units", metavar="UNITS", help="ev (default), hartree, kcal, kj; or KEY=UNIT, homo=meV."),
    ] = None,
    weights: WeightsOption = DEFAULT_WEIGHTS,
    input_format: Annotated[
        str | None,
        typer.Option("-i", "--input-format", metavar="FORMAT", help="Read every input as this: xyz, sdf, ..."),
    ] = None,
    device: DeviceOption = "auto",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, metavar="N", help="Molecules at a time; else chosen.")
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first record that fails.")] = False,
) -> int:
    """Predict the properties of every molecule in the inputs.

    One record comes out for each that goes in, in order; one that cannot be predicted says why.

    Examples:
      qmprop predict water.xyz
      qmprop predict molecules/ 'more/*.sdf' -o results.csv
      qmprop predict water.xyz -p homo,lumo,gap -u hartree -u gap=meV
      cat water.xyz | qmprop predict - -f jsonl

    Exit status: 0 all predicted, 1 the command failed, 2 wrong usage, 3 some records could not be predicted.
    """
    from qmprop import console
    from qmprop.readers import check_format
    from qmprop.targets import parse_properties, parse_units
    from qmprop.writers import Output, choose_format

    if not inputs:
        raise UsageError("no input is named", "Name files, folders or globs, or - for standard input.")
    path = None if output == "-" else output
    name = choose_format(format, path)
    wanted = parse_units(units)
    chosen = {key: wanted[key] for key in parse_properties(properties and ",".join(properties))}
    check_format(input_format)
    _refuse_input(path, inputs)
    encoding = console.output_encoding() if name == "table" and path is None else "utf-8"
    with Output(path, encoding=encoding) as stream:
        from qmprop import inference
        from qmprop.model import load_model
        from qmprop.readers import read_paths

        model = load_model(weights, device=device)
        found = read_paths(inputs, input_format=input_format)
        records = inference.predict(found, properties=chosen, units=chosen, weights=model, batch_size=batch_size)
        writer = _create_writer(name, chosen, path, model.metadata)
        return _write(records, writer, stream, path, fail_fast=fail_fast)


def _write(records: Iterator[Record], writer: Writer, stream: Output, path: str | None, *, fail_fast: bool) -> int:
    """Send every record to the output and what is wrong with it to stderr; return the exit status."""
    from qmprop import console

    notes = console.Notes()
    stopped = False
    source = None
    quiet = path is None and console.writes_to_terminal()
    with console.counter(shown=not quiet) as count:
        stream.write(writer.begin())
        for record in records:
            if record.source != source:
                source = record.source
                _refuse_input(path, [source])
            stream.write(writer.write(record))
            notes.add(record)
            count()
            if fail_fast and record.status == "error":
                stopped = True
                break
        stream.write(writer.end())
    notes.close(stopped=stopped)
    return SOME_RECORDS_FAILED if notes.errors else OK


def _create_writer(name: str, units: Mapping[str, str], path: str | None, metadata: Mapping[str, Any]) -> Writer:
    from qmprop import console
    from qmprop.tables import TableWriter
    from qmprop.writers import create_writer

    if name != "table":
        return create_writer(name, units)
    return TableWriter(units, console.output_style(path), console.known_errors(metadata))


def _refuse_input(output: str | None, inputs: Iterable[str]) -> None:
    from qmprop.writers import is_same_file

    for name in inputs:
        if output is not None and is_same_file(output, name):
            raise UsageError(f"output '{output}' is one of the inputs", "Name another file with -o.")


@app.command()
def train(
    epochs: Annotated[
        int | None, typer.Option("--epochs", metavar="N", help="Passes over the training molecules.")
    ] = None,
    data: DataOption = "qm9",
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="Folder of the run; else runs/<time>.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="FOLDER", help="Continue the interrupted run in FOLDER.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Train on N molecules only.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of the random numbers.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Molecules per step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Largest learning rate.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE.toml", help="Settings; the options above go before them.")
    ] = None,
    device: DeviceOption = "auto",
) -> int:
    """Train a network on QM9's training split.

    Without options this is the job that made the bundled weights.
    The run's folder holds its settings, logs and checkpoints, and at the end a file for predict -w and eval -w.
    Ctrl-C leaves a run that --resume continues.

    Examples:
      qmprop train --epochs 1 --limit 2000
      qmprop train --epochs 100 --out runs/long
      qmprop train --resume runs/long
    """
    if resume is not None and out is not None:
        raise UsageError("--resume and --out exclude each other", "A resumed run stays in its folder.")
    options = {"epochs": epochs, "limit": limit, "seed": seed, "batch_size": batch_size, "lr": lr}
    settings = _load_config(config, resume, options)
    folder = resume or out or os.path.join("runs", time.strftime("%Y-%m-%d_%H-%M-%S"))
    from qmprop import console

    try:
        with console.training_monitor() as monitor:
            from qmprop.training import train as run_training  # takes seconds to import

            result = run_training(
                settings,
                data=data,
                out_dir=folder,
                resume=resume is not None,
                device=device,
                on_load=monitor.load,
                on_step=monitor.step,
                on_epoch=monitor.epoch,
            )
    except ModuleNotFoundError as error:
        raise QmpropError(f"training needs {error.name}", "Install it with: pip install 'qmprop[train]'.") from error
    except KeyboardInterrupt:
        if os.path.exists(os.path.join(folder, "config.toml")):
            console.print_note(f"interrupted; 'qmprop train --resume {folder}' continues after the last whole epoch")
        raise
    console.print_note(f"the run is in {result.folder}; its weights: {result.weights}")
    return OK


def _load_config(path: str | None, resume: str | None, options: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of the file, else of the run to resume, else the shipped ones; options go before them."""
    from qmprop.config import TrainConfig

    if path is None and resume is not None:
        path = os.path.join(resume, "config.toml")
    settings = TrainConfig() if path is None else TrainConfig.from_toml(path)
    return dataclasses.replace(settings, **{key: value for key, value in options.items() if value is not None})


@app.command("eval")
def evaluate(
    weights: WeightsOption = DEFAULT_WEIGHTS,
    data: DataOption = "qm9",
    split: Annotated[Literal["train", "valid", "test"], typer.Option("--split", help="Which part of QM9.")] = "test",
    geometry: Annotated[
        Literal["dft", "mmff", "xtb"], typer.Option("--geometry", help="Where the geometries come from.")
    ] = "dft",
    format: Annotated[
        Literal["table", "json"], typer.Option("-f", "--format", help="How to show the errors.")
    ] = "table",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="The first N molecules only.")
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option("-u", "--units", metavar="UNITS", help="Units of the labels in FILE, as for predict."),
    ] = None,
    device: DeviceOption = "auto",
) -> int:
    """Measure the errors of the weights against reference values.

    Without options: the bundled weights on QM9's test split, which the network has not seen.

    Examples:
      qmprop eval
      qmprop eval -w runs/long/weights.safetensors --split valid -f json
      qmprop eval --data labeled.extxyz
    """
    from qmprop import console, evaluation
    from qmprop.writers import Output

    with console.bars("Reading QM9", "Evaluating") as (load, advance):
        report = evaluation.evaluate(
            weights=weights,
            data=data,
            split=split,
            geometry=geometry,
            device=device,
            limit=limit,
            units=",".join(units) if units else None,
            on_load=load,
            on_progress=advance,
        ).to_dict()
    if format == "json":
        with Output() as output:
            output.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        console.print_parts(console.report_parts(report, evaluation.PAPER_MAE, console.output_style(None)))
    return OK


@app.command()
def info(weights: WeightsOption = DEFAULT_WEIGHTS) -> int:
    """Show versions, devices, and what is known about the weights."""
    from qmprop import console
    from qmprop.model import load_model

    console.print_parts(console.facts_parts("Versions", _versions()))
    console.print_parts(console.facts_parts("Devices", _devices()))
    model = load_model(weights, device="cpu")
    console.print_parts(console.model_parts(model.id, model.metadata))
    return OK


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"qmprop": version("qmprop"), "python": platform.python_version()}
    for name in ("torch", "torch_geometric", "ase", "rdkit", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _devices() -> dict[str, str]:
    import torch

    threads = torch.get_num_threads()
    devices = {"cpu": f"{threads} thread{'' if threads == 1 else 's'}"}
    devices |= {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return devices
