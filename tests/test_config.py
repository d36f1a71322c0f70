"""The settings: what is allowed, and the way to TOML and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmprop.config import LossWeights, ModelConfig, TrainConfig
from qmprop.errors import ConfigError

MODELS = st.builds(
    ModelConfig,
    node_width=st.sampled_from([8, 64, 192, 4096]),
    refine_layers=st.integers(0, 4096),
    layers=st.integers(1, 4096),
    cutoff=st.floats(1.0, 50.0),
    radial=st.integers(2, 4096),
    heads=st.sampled_from([1, 2, 8]),
)
CONFIGS = st.builds(
    TrainConfig,
    epochs=st.integers(1, 10**6),
    lr=st.floats(1e-300, 1e300),
    weight_decay=st.floats(0.0, 1.0, allow_subnormal=False),
    ema_decay=st.floats(0.0, 1.0, exclude_max=True, allow_subnormal=False),
    shift_weight=st.floats(0.0, 1e6, allow_subnormal=False),
    force_field_share=st.floats(0.0, 1.0, allow_subnormal=False),
    jitter=st.floats(0.0, 1.0, allow_subnormal=False),
    limit=st.none() | st.integers(2, 10**6),
    start=st.none() | st.text(min_size=1),
    loss=st.builds(
        LossWeights, mu=st.floats(0.0, 1e6, allow_subnormal=False), gap=st.floats(0.0, 10.0, allow_subnormal=False)
    ),
    model=MODELS,
)


@given(CONFIGS)
def test_toml_and_dict_keep_every_setting(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_text(config.to_toml())
    assert TrainConfig.from_toml(path) == config
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_a_file_may_name_a_few_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("epochs = 3\nlr = 1\n[loss]\nmu = 3\n[model]\nlayers = 2\n")
    expected = TrainConfig(epochs=3, lr=1.0, loss=LossWeights(mu=3.0), model=ModelConfig(layers=2))
    assert TrainConfig.from_toml(path) == expected


def test_shipped_shape() -> None:
    """The bundled weights have this shape: a change of a default is a change of the network."""
    assert dataclasses.asdict(ModelConfig()) == {
        **{"node_width": 192, "message_width": 64, "refine_layers": 3, "layers": 3, "cutoff": 5.0},
        **{"radial": 24, "vectors": 16, "invariants": 32, "flows": 16, "heads": 8, "angles": True, "gate": True},
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("node_width", value) for value in (0, -8, 8192, 64.0, "64", True, None, 10**30)],
        *[("layers", value) for value in (0, 4097, 1.5)],
        *[("refine_layers", value) for value in (-1, 4097, 1.5, True)],
        *[("cutoff", value) for value in (0.0, 0.99, 50.1, float("nan"), float("inf"), "5", None)],
        *[("heads", value) for value in (0, 7)],
        *[(name, value) for name in ("angles", "gate") for value in (1, 0, "true", None)],
        *[("radial", value) for value in (0, 1)],
    ],
)
def test_a_shape_that_is_not_allowed_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{name: value})
    assert f"{name} = {value!r}" in caught.value.message
    assert "must be" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("epochs", value) for value in (0, -1, 2.0, True)],
        *[("batch_size", value) for value in (0, "64")],
        *[("lr", value) for value in (0.0, -1e-3, float("nan"), float("inf"), "1e-3", True)],
        *[("clip", value) for value in (0, float("nan"))],
        *[("weight_decay", value) for value in (-0.1, float("nan"))],
        *[("shift_weight", value) for value in (-1.0, float("inf"))],
        *[("force_field_share", value) for value in (-0.1, 1.1, float("nan"), "0.5", None, True)],
        *[("jitter", value) for value in (-0.02, float("nan"), False)],
        *[("ema_decay", value) for value in (-0.1, 1.0, float("nan"), "0.9", None)],
        *[("limit", value) for value in (0, 1, 2.5, True)],
        *[("seed", value) for value in (-1, 0.5)],
        *[("start", value) for value in ("", 3, True)],
    ],
)
def test_a_setting_that_is_not_allowed_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: value})
    assert f"{name} = {value!r}" in caught.value.message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epoch = 3", "unknown setting 'epoch'"),
        ("[model]\nwidth = 3", "unknown setting 'model.width'"),
        ("model = 3", "[model] is not a table"),
        ("[loss]\nu0 = -1", "u0 = -1"),
        ("[loss]\nu = 1", "unknown setting 'loss.u'"),
        ("loss = 4", "[loss] is not a table"),
        ("epochs = three", "is not valid TOML"),
        ('ema_decay = "x"', "ema_decay"),
        ("epochs = 0", "epochs = 0"),
        ("[model]\nheads = 5", "heads = 5"),
    ],
)
def test_a_wrong_file_is_refused_with_its_problem(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_toml(path)
    assert problem in caught.value.message


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.toml", tmp_path, binary):
        with pytest.raises(ConfigError, match=path.name):
            TrainConfig.from_toml(path)


def test_what_may_be_switched_off_may_be_zero() -> None:
    config = TrainConfig(
        weight_decay=0, shift_weight=0, force_field_share=0, jitter=0, model=ModelConfig(refine_layers=0)
    )
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 5  # type: ignore[misc]
