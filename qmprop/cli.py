"""The commands: parse, call one verb of the library, show the result, return the exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from qmprop import completion
from qmprop.config import TrainConfig
from qmprop.errors import QmpropError, UsageError

if TYPE_CHECKING:
    from qmprop.formats import Failure
    from qmprop.model import Model
    from qmprop.molecule import Molecule
    from qmprop.outputs import Output
    from qmprop.partials import Written
    from qmprop.progress import Meter
    from qmprop.records import Record
    from qmprop.rows import Layout
    from qmprop.writers import Writer

OK: Final = 0
SOME_RECORDS_FAILED: Final = 3

DEFAULT_WEIGHTS: Final = "egnn-qm9"
DEFAULT_LEVEL: Final = "0.9"
_JOB: Final = TrainConfig()

app = typer.Typer(
    name="qmprop",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

WeightsOption = Annotated[
    str,
    typer.Option(
        "-w",
        "--weights",
        metavar="NAME|PATH",
        help="Bundled weights, or a file that train has written.",
        autocompletion=completion.complete_weights,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps.",
        autocompletion=completion.complete_devices,
    ),
]
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

    A graph neural network (EGNN), trained on QM9, answers in milliseconds what
    B3LYP/6-31G(2df,p) would: for neutral, closed-shell molecules of H, C, N, O
    and F with up to nine heavy atoms.

    Start with: qmprop predict molecule.xyz

    'qmprop COMMAND --help' tells all about a command, with examples.
    """


@app.command()
def predict(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT", help="Files, folders, glob patterns, or - for standard input.", show_default=False
        ),
    ] = None,
    input_format: Annotated[
        str | None,
        typer.Option(
            "-i",
            "--input-format",
            metavar="FORMAT",
            help="Read every input as this, for instance xyz, sdf, pdb, mol2 or smi. Default: by suffix and content.",
            autocompletion=completion.complete_input_formats,
            rich_help_panel="Input",
        ),
    ] = None,
    smiles: Annotated[
        list[str] | None,
        typer.Option(
            "--smiles",
            metavar="TEXT",
            help="A SMILES and, behind a blank, a name. May be repeated.",
            rich_help_panel="Input",
        ),
    ] = None,
    files_from: Annotated[
        str | None,
        typer.Option(
            "--files-from",
            metavar="FILE|-",
            help="Read the names of inputs from FILE or standard input: one a line, or ended by null bytes.",
            rich_help_panel="Input",
        ),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            metavar="GLOB",
            help="Read these files of a folder, for instance '*.log'. May be repeated. Default: by suffix.",
            rich_help_panel="Input",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            min=1,
            metavar="N",
            help="Processes that turn SMILES into geometries. Default: one a core.",
            rich_help_panel="Input",
        ),
    ] = None,
    properties: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--properties",
            metavar="KEYS",
            help="Of mu, alpha, homo, lumo, gap, r2, zpve, u0, u, h, g, cv (the default), u0_atom, u_atom, h_atom and "
            "g_atom; separated by commas. May be repeated.",
            autocompletion=completion.complete_properties,
            rich_help_panel="Properties",
        ),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            "-u",
            "--units",
            metavar="UNITS",
            help="ev (the default), hartree, kcal or kj for all energies; KEY=UNIT, such as homo=meV or mu=ea0, for "
            "one property. May be repeated; later ones go before.",
            autocompletion=completion.complete_units,
            rich_help_panel="Properties",
        ),
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(
            "--interval",
            metavar="LEVEL|none",
            help="Share of molecules like the training set's whose true value lies in the interval, such as 0.95 or "
            f"95%; none for no intervals. Default: {DEFAULT_LEVEL}.",
            autocompletion=completion.complete_levels,
            rich_help_panel="Properties",
        ),
    ] = None,
    neighbors: Annotated[
        int,
        typer.Option(
            "--neighbors",
            min=0,
            max=100,
            metavar="N",
            help="In table, json and jsonl, show the N nearest training molecules with their DFT values. Default: 0.",
            show_default=False,
            rich_help_panel="Properties",
        ),
    ] = 0,
    weights: WeightsOption = DEFAULT_WEIGHTS,
    device: DeviceOption = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            metavar="N",
            help="Molecules at a time; 1 answers each before it reads the next. Default: as many as are fast.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "-f",
            "--format",
            metavar="FORMAT",
            help="table, csv, json, jsonl, parquet, extxyz or sdf. Default: by FILE's suffix, else table.",
            autocompletion=completion.complete_formats,
            rich_help_panel="Output",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write to FILE, which is replaced at the end, in one step. Default: standard output.",
            rich_help_panel="Output",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what is finished in FILE.partial, and continue it if it is there.",
            rich_help_panel="Output",
        ),
    ] = False,
    refined: Annotated[
        bool,
        typer.Option(
            "--refined",
            help="In extxyz and sdf, write the geometry that the properties belong to: the DFT minimum expected near "
            "the given one.",
            rich_help_panel="Output",
        ),
    ] = False,
    fail_fast: Annotated[
        bool,
        typer.Option("--fail-fast", help="Stop at the first record that fails.", rich_help_panel="Output"),
    ] = False,
) -> int:
    """Predict the properties of every molecule in the inputs.

    One record comes out for each that goes in, in order. What cannot be read or
    predicted is a record, too: its status is "error", and it says why. Records
    go to standard output or FILE; errors, progress and a summary go to standard
    error.

    Examples:
      qmprop predict water.xyz
      qmprop predict molecules/ 'more/*.sdf' -o results.csv
      qmprop predict water.xyz -p homo,lumo,gap -u hartree -u gap=meV
      qmprop predict --smiles 'CCO ethanol' --smiles 'CC=O acetaldehyde'
      qmprop predict molecule.xyz --interval 0.95 --neighbors 5
      qmprop predict library.sdf.gz -o predicted.parquet
      qmprop predict library.sdf -o predicted.sdf --resume
      qmprop predict library.sdf -o minima.sdf --refined
      cat library.sdf | qmprop predict - -f jsonl | jq .properties.gap.value
      find . -name '*.xyz' -print0 | qmprop predict --files-from - -o all.csv

    Exit status:
      0    every record was predicted, perhaps with warnings
      1    the command could not do its job: weights, output or device
      2    wrong usage: an unknown option, property, unit or format
      3    finished, but some records could not be predicted
      130  interrupted
      141  the reader of the output went away
    """
    from qmprop import console
    from qmprop.figures import parse_level
    from qmprop.outputs import Output
    from qmprop.readers import check_format
    from qmprop.targets import parse_properties, parse_units
    from qmprop.writers import choose_format

    inputs = inputs or []
    if not inputs and not smiles and files_from is None:
        raise UsageError("no input is named", "Name files, folders or globs, - for standard input, or --smiles.")
    if files_from == "-" and "-" in inputs:
        raise UsageError("standard input cannot be both molecules and --files-from", "Put one of them into a file.")
    path = None if output == "-" else output
    name = choose_format(format, path)
    wanted = parse_units(units)
    chosen = {key: wanted[key] for key in parse_properties(properties and ",".join(properties))}
    check_format(input_format)
    level = parse_level(DEFAULT_LEVEL if interval is None else interval)
    _check_output(name, path, resume=resume, refined=refined, neighbors=neighbors)
    _refuse_input(path, inputs)
    encoding = console.output_encoding() if name == "table" and path is None else "utf-8"
    with Output(path, encoding=encoding, resumable=resume) as stream:
        from qmprop import inference
        from qmprop.model import load_model
        from qmprop.partials import check_inputs
        from qmprop.progress import Meter

        model = load_model(weights, device=device)
        layout = _create_layout(chosen, level, model, insist=interval is not None)
        writer = _create_writer(name, layout, path, model)
        written = _find_written(stream, name, layout, model.id, neighbors)
        meter = Meter([] if smiles or files_from is not None else inputs, patterns=pattern or ())
        found = check_inputs(
            _read(inputs, files_from, smiles or [], input_format, pattern, jobs, meter), written, stream.partial
        )
        pairs = inference.predict_pairs(
            found,
            properties=chosen,
            units=chosen,
            weights=model,
            batch_size=batch_size,
            interval=layout.level,
            neighbors=neighbors,
            skip=written.count,
            refined=refined,
        )
        return _write(pairs, writer, stream, path, written, meter, fail_fast=fail_fast)


def _read(
    inputs: list[str],
    files_from: str | None,
    smiles: list[str],
    input_format: str | None,
    pattern: list[str] | None,
    jobs: int | None,
    meter: Meter,
) -> Iterator[Molecule | Failure]:
    """Return the records of the inputs, then those of the files in the list, then those of the SMILES."""
    from qmprop.readers import read_list, read_paths, read_smiles
    from qmprop.workers import usable_cores

    jobs = jobs or usable_cores()
    paths = itertools.chain(inputs, read_list(files_from) if files_from is not None else ())
    return itertools.chain(
        read_paths(paths, input_format=input_format, pattern=pattern, jobs=jobs, on_open=meter.follow),
        read_smiles(smiles, jobs=jobs),
    )


def _check_output(name: str, path: str | None, *, resume: bool, refined: bool, neighbors: int) -> None:
    """Refuse what cannot be written to a terminal, or not be resumed, or has no place for what is asked for."""
    from qmprop import console
    from qmprop.partials import RESUMABLE

    if resume and name not in RESUMABLE:
        raise UsageError(f"format '{name}' cannot be resumed", f"Use one of: {', '.join(RESUMABLE)}.")
    if refined and name not in ("extxyz", "sdf"):
        raise UsageError(f"format '{name}' holds no geometries", "With --refined, use -f extxyz or -f sdf.")
    if neighbors and name not in ("table", "json", "jsonl"):
        raise UsageError(f"format '{name}' holds no neighbors", "With --neighbors, use -f table, json or jsonl.")
    if resume and path is None:
        raise UsageError("standard output cannot be resumed", "Name a file with -o.")
    if name == "parquet" and path is None and console.writes_to_terminal():
        raise UsageError("parquet is nothing for a terminal", "Name a file with -o, or use another format.")


def _create_layout(units: Mapping[str, str], level: float | None, model: Model, *, insist: bool) -> Layout:
    """Return the columns that the weights can fill; refuse intervals that they do not give, if they are insisted on."""
    from qmprop.rows import Layout

    calibrated = bool(model.extras)
    if level is not None and insist and not calibrated:
        raise UsageError(f"the weights {model.id} have no calibration for intervals", "Leave --interval out.")
    return Layout(units, level if calibrated else None, judged=calibrated)


def _find_written(stream: Output, name: str, layout: Layout, model: str, neighbors: int) -> Written:
    """Return what an earlier run left in a resumable output, which then continues behind it."""
    from qmprop import console
    from qmprop.partials import Written, find_written

    if stream.partial is None:
        return Written()
    written = find_written(stream.partial, name, layout, model, neighbors)
    stream.cut(written.size)
    if written.count:
        console.print_note(f"continuing after {written.count:,} records in '{stream.partial}'")
    return written


def _write(
    pairs: Iterator[tuple[Molecule | Failure, Record]],
    writer: Writer,
    stream: Output,
    path: str | None,
    written: Written,
    meter: Meter,
    *,
    fail_fast: bool,
) -> int:
    """Send every record to the output and what is wrong with it to stderr; return the exit status."""
    from qmprop import console
    from qmprop.molecule import Molecule
    from qmprop.tables import TableWriter

    notes = console.Notes(written.count, written.errors, talkative=not isinstance(writer, TableWriter))
    stopped = False
    source = None
    quiet = path is None and console.writes_to_terminal()
    with console.counter(shown=not quiet, share=meter.share) as count:
        stream.write(writer.begin(written.count))
        for item, record in pairs:
            if record.source != source:
                source = record.source
                _refuse_input(path, [source])
            stream.write(writer.write(record, item if isinstance(item, Molecule) else None))
            notes.add(record)
            count()
            if fail_fast and record.status == "error":
                stopped = True
                break
        stream.write(writer.end())
    notes.close(stopped=stopped)
    return SOME_RECORDS_FAILED if notes.errors else OK


def _create_writer(name: str, layout: Layout, path: str | None, model: Model) -> Writer:
    from qmprop import __version__, console
    from qmprop.card import known_errors
    from qmprop.tables import TableWriter
    from qmprop.writers import create_writer

    if name != "table":
        return create_writer(name, layout, {"qmprop_model": model.id, "qmprop_version": __version__})
    return TableWriter(layout.units, console.output_style(path), known_errors(model.metadata))


def _refuse_input(output: str | None, inputs: Iterable[str]) -> None:
    from qmprop.outputs import is_same_file

    for name in inputs:
        if output is not None and is_same_file(output, name):
            raise UsageError(f"output '{output}' is one of the inputs", "Name another file with -o.")


@app.command()
def train(
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", metavar="N", help=f"Passes over the training molecules. Default: {_JOB.epochs}."),
    ] = None,
    data: DataOption = "qm9",
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="Folder of the run. Default: runs/<time>.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="FOLDER", help="Continue the interrupted run in FOLDER.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Train on N molecules only. Default: all.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help=f"Of the random numbers. Default: {_JOB.seed}.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help=f"Molecules per step. Default: {_JOB.batch_size}.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="RATE", help=f"Largest learning rate. Default: {_JOB.lr:g}.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE.toml", help="Settings; the options above go before them.")
    ] = None,
    device: DeviceOption = "auto",
) -> int:
    """Train a network on QM9's training split, and calibrate it.

    Without options this is the first stage of what made the first of the
    bundled networks; their card tells the others.
    The run's folder holds its settings, logs and checkpoints, and at the end a
    file for predict -w and eval -w. Ctrl-C leaves a run that --resume continues.

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
                on_calibrate=monitor.calibrate,
                on_measure=monitor.measure,
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
    if path is None and resume is not None:
        path = os.path.join(resume, "config.toml")
    settings = _JOB if path is None else TrainConfig.from_toml(path)
    return dataclasses.replace(settings, **{key: value for key, value in options.items() if value is not None})


@app.command()
def calibrate(
    weights: Annotated[
        list[str],
        typer.Option("-w", "--weights", metavar="FILE", help="The weights file; several make an ensemble."),
    ],
    data: DataOption = "qm9",
    out: Annotated[
        str | None, typer.Option("-o", "--out", metavar="FILE", help="Write here. Default: into the file itself.")
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            "--share", metavar="X", help="How much each network of an ensemble counts, once for each -w. Default: 1."
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> int:
    """Give weights their error bars, and a sense of what they do not know.

    The molecules that were kept for it tell how far predictions are off; no
    molecule trained on takes part in that. `train` does this at its end.
    Afterwards the test split is evaluated, and the file keeps the result.
    Of several weights, which have been trained on the same molecules, the
    predictions are averaged: more accurate than each, and as much slower.

    Examples:
      qmprop calibrate -w runs/long/weights.safetensors
      qmprop calibrate -w runs/long/weights.safetensors -o calibrated.safetensors
      qmprop calibrate -w a.safetensors -w b.safetensors -o both.safetensors
    """
    from qmprop import console
    from qmprop.calibration import calibrate as run_calibration

    with console.bars("Reading QM9", "Calibrating", "Measuring") as (load, advance, measure):
        model = run_calibration(
            weights,
            data=data,
            out=out,
            shares=share or None,
            device=device,
            on_load=load,
            on_progress=advance,
            on_measure=measure,
        )
    console.print_note(f"calibrated weights {model.id} are in {out or weights[0]}")
    return OK


@app.command("eval")
def evaluate(
    weights: WeightsOption = DEFAULT_WEIGHTS,
    data: DataOption = "qm9",
    split: Annotated[Literal["train", "valid", "test"], typer.Option("--split", help="Which part of QM9.")] = "test",
    geometry: Annotated[
        Literal["dft", "mmff", "xtb", "all"] | None,
        typer.Option(
            "--geometry",
            help="DFT (default), or the MMFF94 or GFN2-xTB minima reached from it; or all three.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["table", "json"], typer.Option("-f", "--format", help="How to show the errors.")
    ] = "table",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="The first N molecules only. Default: all.")
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            "-u", "--units", metavar="UNITS", help="Units of the labels in FILE, as for predict. Default: ev."
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Write tables and charts to FILE, too: one HTML page. Of QM9 with all geometries, unless --geometry "
            "says otherwise. Default: none.",
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> int:
    """Measure the errors of the weights against reference values.

    Without options: the bundled weights on QM9's test split, which the network has not seen.

    Examples:
      qmprop eval
      qmprop eval -w runs/long/weights.safetensors --split valid -f json
      qmprop eval --geometry mmff
      qmprop eval --data labeled.extxyz
      qmprop eval --report report.html
    """
    from qmprop import console, evaluation
    from qmprop.outputs import Output

    kinds = _choose_geometries(geometry, data, reported=report is not None)
    spec = ",".join(units) if units else None
    with _open_report(report, [data, weights]) as page:
        with console.bars("Reading QM9", "Minimizing", "Evaluating") as (load, minimize, advance):
            found = [
                evaluation.evaluate(
                    weights=weights,
                    data=data,
                    split=split,
                    geometry=kind,
                    device=device,
                    limit=limit,
                    units=spec,
                    smiles=report is not None,
                    on_load=load,
                    on_minimize=minimize,
                    on_progress=advance,
                )
                for kind in kinds
            ]
        if len(found) > 1:
            found = evaluation.compare_geometries(found)
        if page is not None:
            from qmprop.report import render_report

            options = {"-w": weights, "--data": data, "--split": split, "--geometry": geometry, "-u": spec}
            options |= {"--limit": None if limit is None else str(limit), "--device": device}
            page.write(render_report(found, command=_repeat_eval(options)))
    reports = [item.to_dict() for item in found]
    if format == "json":
        with Output() as output:
            shown = reports[0] if len(reports) == 1 else reports
            output.write(json.dumps(shown, indent=2, allow_nan=False) + "\n")
    else:
        style, paper = console.output_style(None), evaluation.PAPER_MAE
        parts = (
            console.report_parts(reports[0], paper, style)
            if len(reports) == 1
            else console.comparison_parts(reports, paper, style)
        )
        console.print_parts(parts)
    for item in reports:
        console.note_skipped(item)
    return OK


def _choose_geometries(geometry: str | None, data: str, *, reported: bool) -> tuple[str, ...]:
    """Return the kinds of geometry to evaluate: for a report of QM9, by default, all."""
    from qmprop import evaluation
    from qmprop.datasets import is_cache

    if geometry == "all" or (geometry is None and reported and (data == "qm9" or is_cache(data))):
        return evaluation.GEOMETRIES
    return (geometry or "dft",)


def _open_report(path: str | None, inputs: list[str]) -> Output | contextlib.nullcontext[None]:
    """Open the page to write, if there is to be one, so that what stands in its way is told at once."""
    from qmprop.outputs import Output

    if path is None:
        return contextlib.nullcontext()
    from qmprop.report import check_report

    check_report(path, inputs)
    return Output(path, option="--report")


def _repeat_eval(options: Mapping[str, str | None]) -> str:
    """Return the command that makes the report again: the options that are not as they are without them."""
    defaults = {"-w": DEFAULT_WEIGHTS, "--data": "qm9", "--split": "test", "--device": "auto"}
    words = [
        word
        for name, text in options.items()
        if text is not None and text != defaults.get(name)
        for word in (name, text)
    ]
    return shlex.join(["qmprop", "eval", *words, "--report", "report.html"])


@app.command()
def schema() -> int:
    """Print the JSON Schema of a record.

    It is a draft 2020-12 schema of a line of jsonl, and of an item of json's array.

    Examples:
      qmprop schema > record.schema.json
    """
    from qmprop.outputs import Output
    from qmprop.records import RECORD_SCHEMA

    with Output() as output:
        output.write(json.dumps(RECORD_SCHEMA, indent=2) + "\n")
    return OK


@app.command()
def info(weights: WeightsOption = DEFAULT_WEIGHTS) -> int:
    """Show versions, devices, and what is known about the weights."""
    from qmprop import console
    from qmprop.card import facts_parts, model_parts
    from qmprop.model import load_model

    style = console.output_style(None)
    console.print_parts(facts_parts("Versions", _versions(), style) + facts_parts("Devices", _devices(), style))
    model = load_model(weights, device="cpu")
    console.print_parts(model_parts(model.id, model.metadata, style))
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
