"""Frozen settings of the network and of a training run; to and from TOML, with validation."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from qmprop.errors import ConfigError


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r} is not allowed", f"It must be {allowed}.")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of the network.

    Attributes:
        node_width: Features per atom.
        message_width: Features per pair of neighbors.
        refine_layers: Number of message-passing layers that refine the geometry; 0 takes it as it is.
        layers: Number of message-passing layers that read the properties from the refined geometry.
        cutoff: Radius of the neighbor graph in Å.
        radial: Number of Gaussian distance features.
        vectors: Equivariant vectors per atom.
        invariants: Scalar products of those vectors that each layer reads.
        angles: Whether messages read and carry those vectors.
        gate: Whether each message is weighed by a number between 0 and 1 that it decides itself; else what it reads of
            the vectors is bounded instead.
        flows: Channels of the charge flow between neighbors.
        heads: Attention heads of the orbital-energy readout.
    """

    node_width: int = 192
    message_width: int = 64
    refine_layers: int = 3
    layers: int = 3
    cutoff: float = 5.0
    radial: int = 24
    vectors: int = 16
    invariants: int = 32
    flows: int = 16
    heads: int = 8
    angles: bool = True
    gate: bool = True

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "cutoff":
                _require(isinstance(value, int | float) and 1.0 <= value <= 50.0, "cutoff", value, "1 to 50 Å")
                object.__setattr__(self, "cutoff", float(value))
            elif item.name in ("angles", "gate"):
                _require(isinstance(value, bool), item.name, value, "true or false")
            else:
                lowest = 0 if item.name == "refine_layers" else 1
                allowed = f"a whole number from {lowest} to 4096"
                _require(_is_int(value) and lowest <= value <= 4096, item.name, value, allowed)
        _require(self.node_width % self.heads == 0, "heads", self.heads, f"a divisor of node_width {self.node_width}")
        _require(self.radial >= 2, "radial", self.radial, "2 or more")


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the normalized absolute errors in the loss.

    U, H and G are U0 and two small differences, which need little: `thermal` is U - U0, `entropy` is H - G.
    """

    mu: float = 2.0
    alpha: float = 2.0
    homo: float = 1.0
    lumo: float = 1.5
    gap: float = 1.0
    r2: float = 2.0
    zpve: float = 1.0
    u0: float = 4.0
    thermal: float = 0.3
    entropy: float = 0.3
    cv: float = 1.0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            _require(_is_finite(value) and value >= 0, item.name, value, "0 or a positive number")
            object.__setattr__(self, item.name, float(value))
        _require(sum(dataclasses.astuple(self)) > 0, "loss", 0, "above 0 for one property or more")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A training run.

    Attributes:
        epochs: Passes over the training molecules; the learning rate reaches zero at the end of the last.
        batch_size: Molecules per step.
        lr: Largest learning rate, that of the matrices, reached after the warm-up.
        warmup_steps: Steps of linear warm-up (at most a twentieth of the run).
        weight_decay: Decoupled weight decay.
        clip: Largest gradient norm.
        ema_decay: Decay per step of the averaged weights that are validated and shipped.
        shift_weight: Weight of the distance between refined and DFT positions in the loss, per Å.
        charge_weight: Weight of the normalized error of atomic charges in the loss, which the network learns beside the
            properties; only QM9's are known.
        vibration_weight: The same of the number of vibrational modes near certain wavenumbers.
        force_field_share: Share of the molecules of a step that do not come in their DFT geometry but in that of a
            cheaper method, mostly a force field, and for a third of them somewhere between the two, and jittered.
        jitter: Standard deviation of the jitter in Å.
        seed: Of the initial weights and of the order of the molecules.
        limit: Train on this many molecules only; None means all.
        start: Weights to start from, by name or path; None means random ones.
        loss: Weights of the properties in the loss.
        model: Shape of the network.
    """

    epochs: int = 19
    batch_size: int = 96
    lr: float = 3e-3
    warmup_steps: int = 500
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.999
    shift_weight: float = 4.0
    charge_weight: float = 0.5
    vibration_weight: float = 0.3
    force_field_share: float = 0.5
    jitter: float = 0.02
    seed: int = 0
    limit: int | None = None
    start: str | None = None
    loss: LossWeights = field(default_factory=LossWeights)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("warmup_steps", 0), ("seed", 0)):
            value = getattr(self, name)
            _require(_is_int(value) and value >= lowest, name, value, f"a whole number, {lowest} or more")
        positive = ("lr", "clip")
        for name in (*positive, "weight_decay", "shift_weight", "charge_weight", "vibration_weight", "jitter"):
            value = getattr(self, name)
            allowed = _is_finite(value) and (value > 0 or (value == 0 and name not in positive))
            _require(allowed, name, value, "a positive number")
            object.__setattr__(self, name, float(value))
        decay = self.ema_decay
        _require(isinstance(decay, int | float) and 0 <= decay < 1, "ema_decay", decay, "at least 0 and below 1")
        share = self.force_field_share
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        _require(is_number and 0 <= share <= 1, "force_field_share", share, "from 0 to 1")
        if self.limit is not None:
            _require(_is_int(self.limit) and self.limit >= 2, "limit", self.limit, "a whole number, 2 or more")
        start = self.start
        _require(start is None or (isinstance(start, str) and start != ""), "start", start, "a name or path of weights")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; those that are None are left out."""
        data = dataclasses.asdict(self)
        return {key: value for key, value in data.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain values.

        Raises:
            ConfigError: A name is unknown or a value is not allowed.
        """
        values = dict(data)
        tables = {}
        for name, kind in _TABLES.items():
            table = values.pop(name, {})
            if not isinstance(table, Mapping):
                raise ConfigError(f"[{name}] is not a table", f"Write [{name}] on a line of its own.")
            _check_names(kind, table, f"{name}.")
            tables[name] = (kind, table)
        _check_names(cls, values, "")
        try:
            return cls(**values, **{name: kind(**table) for name, (kind, table) in tables.items()})
        except TypeError as error:
            raise ConfigError(f"a configuration value has the wrong type: {error}") from error

    def to_toml(self) -> str:
        """Return the settings as TOML text."""
        values = self.to_dict()
        tables = {name: values.pop(name) for name in _TABLES}
        lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
        for name, table in tables.items():
            lines += ["", f"[{name}]"] + [f"{key} = {_toml(value)}" for key, value in table.items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read settings from a TOML file.

        Raises:
            ConfigError: The file cannot be read, is not TOML, or holds unknown names or values.
        """
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error


#: The tables of a settings file.
_TABLES: Final[Mapping[str, type]] = {"loss": LossWeights, "model": ModelConfig}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _toml(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which JSON leaves, and TOML forbids
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _check_names(cls: type, values: Mapping[str, Any], prefix: str) -> None:
    known = [item.name for item in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting '{prefix}{name}'", f"Known settings: {', '.join(known)}.")
