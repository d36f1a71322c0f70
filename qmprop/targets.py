"""The property table: keys, symbols, units, and every physical constant and conversion factor.

Constants are CODATA 2018. Each unit is defined once, as its size in the default unit of its dimension, so that a
conversion forward and back uses one and the same number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from qmprop.errors import UsageError

HARTREE_EV: Final = 27.211386245988
BOHR_ANGSTROM: Final = 0.529177210903
EA0_DEBYE: Final = 2.541746473
ELEMENTARY_CHARGE: Final = 1.602176634e-19  # C, exact
AVOGADRO: Final = 6.02214076e23  # 1/mol, exact
LIGHT_SPEED: Final = 299792458.0  # m/s, exact
CALORIE: Final = 4.184  # J, thermochemical, exact
GAS_CONSTANT: Final = 8.314462618  # J/(mol K)
TEMPERATURE: Final = 298.15  # K, of QM9's thermochemistry

_KJ_MOL_EV: Final = 1000.0 / (ELEMENTARY_CHARGE * AVOGADRO)  # 1 kJ/mol in eV
RT_EV: Final = GAS_CONSTANT * TEMPERATURE / 1000.0 * _KJ_MOL_EV  # H - U of every molecule: 25.69 meV

#: Size of each unit in the default unit (the first) of its dimension.
UNITS: Final[Mapping[str, Mapping[str, float]]] = {
    "energy": {
        "eV": 1.0,
        "meV": 1e-3,
        "Ha": HARTREE_EV,
        "kcal/mol": CALORIE * _KJ_MOL_EV,
        "kJ/mol": _KJ_MOL_EV,
    },
    "dipole": {"D": 1.0, "ea0": EA0_DEBYE, "C m": 1e21 * LIGHT_SPEED},
    "polarizability": {"a0^3": 1.0, "A^3": BOHR_ANGSTROM**-3},
    "area": {"a0^2": 1.0, "A^2": BOHR_ANGSTROM**-2},
    "heat capacity": {"cal/(mol K)": 1.0, "J/(mol K)": 1.0 / CALORIE},
}


@dataclass(frozen=True, slots=True)
class Target:
    """One property.

    Attributes:
        key: Name on the command line and in records.
        symbol: Name in tables.
        description: What it is, in a few words.
        dimension: Key into `UNITS`.
        extensive: Whether it adds up over fragments that are far apart.
        qm9_column: Column of the `qm9pack` files it comes from.
        qm9_unit: Unit of that column.
        total: For an atomization energy, the key of the total energy it is derived from.
    """

    key: str
    symbol: str
    description: str
    dimension: str
    extensive: bool
    qm9_column: str
    qm9_unit: str
    total: str | None = None

    @property
    def unit(self) -> str:
        """The default unit."""
        return next(iter(UNITS[self.dimension]))

    @property
    def evaluation_unit(self) -> str:
        """The unit errors are reported in: meV for energies, the default unit for the rest."""
        return "meV" if self.dimension == "energy" else self.unit


_ALL = (
    Target("mu", "μ", "dipole moment (norm)", "dipole", False, "Dipole_debye", "D"),
    Target("alpha", "α", "isotropic polarizability", "polarizability", True, "Polarizability_bohr3", "a0^3"),
    Target("homo", "ε(HOMO)", "energy of the highest occupied orbital", "energy", False, "HOMO_au", "Ha"),
    Target("lumo", "ε(LUMO)", "energy of the lowest unoccupied orbital", "energy", False, "LUMO_au", "Ha"),
    Target("gap", "Δε", "LUMO - HOMO", "energy", False, "HOMO_LUMO_gap_au", "Ha"),
    Target("r2", "⟨R²⟩", "electronic spatial extent", "area", False, "R2_bohr2", "a0^2"),
    Target("zpve", "ZPVE", "zero-point vibrational energy", "energy", True, "ZPVE_au", "Ha"),
    Target("u0", "U₀", "total internal energy at 0 K", "energy", True, "InternalEnergy_0K_au", "Ha"),
    Target("u", "U", "total internal energy at 298.15 K", "energy", True, "InternalEnergy_298K_au", "Ha"),
    Target("h", "H", "total enthalpy at 298.15 K", "energy", True, "Enthalphy_298K_au", "Ha"),
    Target("g", "G", "total free energy at 298.15 K", "energy", True, "GibbsFreeEnergy_298K_au", "Ha"),
    Target("cv", "Cᵥ", "heat capacity at 298.15 K", "heat capacity", True, "Heatcapacity_Cv_cal_mol_K", "cal/(mol K)"),
    Target("u0_atom", "U₀ at.", "atomization part of U0", "energy", True, "", "", total="u0"),
    Target("u_atom", "U at.", "atomization part of U", "energy", True, "", "", total="u"),
    Target("h_atom", "H at.", "atomization part of H", "energy", True, "", "", total="h"),
    Target("g_atom", "G at.", "atomization part of G", "energy", True, "", "", total="g"),
)

TARGETS: Final[Mapping[str, Target]] = {target.key: target for target in _ALL}
#: The twelve properties of QM9, in the order of every table, array and file of this project.
DEFAULT_KEYS: Final = tuple(target.key for target in _ALL if target.total is None)
ATOMIZATION_KEYS: Final = tuple(target.key for target in _ALL if target.total is not None)

#: Elements QM9 covers, by atomic number.
ELEMENTS: Final[Mapping[int, str]] = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}

#: Standard atomic weights in u, by atomic number.
ATOMIC_MASSES: Final[Mapping[int, float]] = {1: 1.008, 6: 12.011, 7: 14.007, 8: 15.999, 9: 18.998}

#: Energies of the free atoms at B3LYP/6-31G(2df,p) in Hartree, from QM9's `atomref.txt`.
ATOM_ENERGIES_HARTREE: Final[Mapping[str, Mapping[int, float]]] = {
    "u0": {1: -0.500273, 6: -37.846772, 7: -54.583861, 8: -75.064579, 9: -99.718730},
    "u": {1: -0.498857, 6: -37.845355, 7: -54.582445, 8: -75.063163, 9: -99.717314},
    "h": {1: -0.497912, 6: -37.844411, 7: -54.581501, 8: -75.062219, 9: -99.716370},
    "g": {1: -0.510927, 6: -37.861317, 7: -54.598897, 8: -75.079532, 9: -99.733544},
}

_ENERGY_PRESETS: Final = {"ev": "eV", "hartree": "Ha", "kcal": "kcal/mol", "kj": "kJ/mol"}
PRESETS: Final[Mapping[str, Mapping[str, str]]] = {
    preset: {
        key: (
            energy
            if target.dimension == "energy"
            else "J/(mol K)"
            if preset == "kj" and target.dimension == "heat capacity"
            else target.unit
        )
        for key, target in TARGETS.items()
    }
    for preset, energy in _ENERGY_PRESETS.items()
}


def convert(value: float, key: str, unit: str, *, source_unit: str | None = None) -> float:
    """Convert a value of property `key` from `source_unit` (default: the property's default unit) to `unit`.

    Raises:
        UsageError: `key` or a unit is unknown.
    """
    return value * unit_factor(key, source_unit or TARGETS[key].unit) / unit_factor(key, unit)


def unit_factor(key: str, unit: str) -> float:
    """Return the size of `unit` in the default unit of property `key`.

    Raises:
        UsageError: `key` or `unit` is unknown.
    """
    units = UNITS[_target(key).dimension]
    if unit not in units:
        raise UsageError(f"unknown unit '{unit}' for property '{key}'", f"Use one of: {', '.join(units)}.")
    return units[unit]


def parse_properties(text: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the property keys named by `text`, "mu,homo" or an iterable of keys; None means the default twelve.

    Raises:
        UsageError: A key is unknown or none is given.
    """
    if text is None:
        return DEFAULT_KEYS
    names = text.split(",") if isinstance(text, str) else list(text)
    keys = tuple(dict.fromkeys(name.strip().lower() for name in names if name.strip()))
    if not keys:
        raise UsageError("no property is named", f"Choose from: {', '.join(TARGETS)}.")
    for key in keys:
        _target(key)
    return keys


def parse_units(specs: str | Iterable[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Return the unit of every property for presets and `key=unit` assignments, applied in order.

    Args:
        specs: "ev", "kcal,mu=ea0", several of those, or a mapping of key to unit; None means "ev".

    Raises:
        UsageError: A preset, key or unit is unknown.
    """
    units = dict(PRESETS["ev"])
    if specs is None:
        return units
    if isinstance(specs, Mapping):
        items = [f"{key}={unit}" for key, unit in specs.items()]
    else:
        texts = [specs] if isinstance(specs, str) else list(specs)
        items = [item.strip() for text in texts for item in text.split(",") if item.strip()]
    for item in items:
        key, equals, unit = (part.strip() for part in item.partition("="))
        if not equals:
            if key.lower() not in PRESETS:
                raise UsageError(
                    f"unknown unit preset '{key}'",
                    f"Use one of: {', '.join(PRESETS)}; or KEY=UNIT, for instance homo=meV.",
                )
            units |= PRESETS[key.lower()]
            continue
        unit_factor(key.lower(), unit)
        units[key.lower()] = unit
    return units


def format_units(units: Mapping[str, str]) -> str:
    """Return the units as text that `parse_units` reads: "mu=D,homo=eV"."""
    return ",".join(f"{key}={unit}" for key, unit in units.items())


def _target(key: str) -> Target:
    if key not in TARGETS:
        raise UsageError(f"unknown property '{key}'", f"Choose from: {', '.join(TARGETS)}.")
    return TARGETS[key]
