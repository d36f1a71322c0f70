"""The network: an E(n)-equivariant graph neural network with outputs built from physics.

Message passing follows Satorras, Hoogeboom, Welling, "E(n) Equivariant Graph Neural Networks", ICML 2021 (equation
numbers below). Tensors in, tensors out; N atoms, P pairs of neighbors, M molecules, F node features.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from qmprop.config import ModelConfig
from qmprop.targets import ATOMIC_MASSES, BOHR_ANGSTROM, EA0_DEBYE, ELEMENTS

#: What the network puts out, in this order; `baseline` turns them into the twelve properties.
#: thermal is U - U0, entropy is H - G.
LATENTS: Final = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0", "thermal", "entropy", "cv")
_SUMS: Final = ("alpha", "r2", "zpve", "u0", "thermal", "entropy", "cv")
_MAX_NUMBER: Final = max(ELEMENTS)
#: What scalar products of vectors, which are hardly ever above 3, stay below in messages without a gate to shut.
_MOST: Final = 8.0


class RadialBasis(nn.Module):
    """Gaussians exp(-(d - mu_k)^2 / (2 w^2)), centers evenly from 0.8 Å to the cut-off, one spacing wide."""

    centers: Tensor

    def __init__(self, count: int, cutoff: float) -> None:
        super().__init__()
        nearest = min(0.8, cutoff / 2)
        self.width = (cutoff - nearest) / (count - 1)
        self.register_buffer("centers", torch.linspace(nearest, cutoff, count), persistent=False)

    def forward(self, distances: Tensor) -> Tensor:
        """Distances in Å [E] to features [E, count]."""
        return torch.exp(((distances[:, None] - self.centers) / self.width).square() * -0.5)


def envelope(distances: Tensor, cutoff: float) -> Tensor:
    """Return 1 - 10 x^3 + 15 x^4 - 6 x^5 with x = d / cutoff: from 1 to 0 with two smooth derivatives [E]."""
    x = (distances / cutoff).clamp(max=1.0)
    return 1.0 + x**3 * (-10.0 + x * (15.0 - 6.0 * x))


class Pairs(NamedTuple):
    """What the layers read of P pairs of atoms that are neighbors in one geometry.

    Attributes:
        first: Index i of each pair [P].
        second: Index j of each pair [P].
        radial: Distance features [P, K].
        units: (x_i - x_j) / |x_i - x_j| [P, 3].
        smooth: Envelope of the cut-off [P, 1].
    """

    first: Tensor
    second: Tensor
    radial: Tensor
    units: Tensor
    smooth: Tensor


class Encoding(NamedTuple):
    """What the layers make of N atoms.

    Attributes:
        positions: The refined geometry in Å, in the type of the given one [N, 3].
        pairs: Neighbors in the refined geometry.
        h: Final node features [N, F].
        v: Final node vectors [N, 3, V].
    """

    positions: Tensor
    pairs: Pairs
    h: Tensor
    v: Tensor


class EGNNLayer(nn.Module):
    """One round of messages (EGNN equations 3 to 6, with or without the soft edge gate of equation 8).

    phi_e(h_i, h_j, d_ij, a_ij) = phi_p(A h_i + A h_j + C d_ij + D a_ij) * S h_j: the part phi_p with the maps and the
    gate is the same for both directions of a pair and runs once, A and S run once per atom. a_ij holds what the vectors
    of the two atoms tell of angles and dihedrals: with u_ij = (x_i - x_j) / |x_i - x_j|, and channel by channel,
    <v_i, u_ij> + <v_j, u_ji>, their product, and <v_i, v_j>. Vectors travel with the messages, too (the same idea as in
    Schütt, Unke, Gastegger, "Equivariant message passing for the prediction of tensorial properties and molecular
    spectra", ICML 2021, equations 7 and 8).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        nodes, messages = config.node_width, config.message_width
        self.vectors, self.angles = config.vectors, config.angles
        self.norm = nn.LayerNorm(nodes)
        self.member = nn.Linear(nodes, messages)
        self.sender = nn.Linear(nodes, messages)
        self.distance = nn.Linear(config.radial, messages, bias=False)
        self.message = nn.Linear(messages, messages)
        self.gate = nn.Linear(messages, 1) if config.gate else None
        self.direction = nn.Linear(messages, config.vectors, bias=False)
        if config.angles:
            self.angle = nn.Linear(3 * config.vectors, messages, bias=False)
            self.carry = nn.Linear(messages, config.vectors, bias=False)
        self.mix_left = nn.Linear(config.vectors, config.invariants, bias=False)
        self.mix_right = nn.Linear(config.vectors, config.invariants, bias=False)
        self.update = nn.Sequential(
            nn.Linear(nodes + messages + config.invariants, nodes), nn.SiLU(), nn.Linear(nodes, nodes)
        )

    def forward(self, h: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Update node states.

        Args:
            h: Node features [N, F].
            v: Node vectors [N, 3, V].
            pairs: Neighbors.

        Returns:
            The new h and v.
        """
        x = self.norm(h)
        first, second, units = pairs.first, pairs.second, pairs.units[:, :, None]
        members, senders = self.member(x), self.sender(x)
        # phi_p, the part of phi_e that i and j share                                                      (3)
        p = self.distance(pairs.radial) + members.index_select(0, first)
        p = p + members.index_select(0, second)
        if self.angles:
            v_i, v_j = (v.flatten(1).index_select(0, side).view(-1, 3, self.vectors) for side in (first, second))
            along_i, along_j = (v_i * units).sum(dim=1), -(v_j * units).sum(dim=1)
            a_ij = torch.cat([along_i + along_j, along_i * along_j, (v_i * v_j).sum(dim=1)], dim=1)
            p = p + self.angle(a_ij if self.gate is not None else _bound(a_ij))
        p = functional.silu(self.message(functional.silu(p)))
        # times e_ij = sigmoid(w . p_ij + b), if there is a gate, and the envelope                          (8)
        p = p * (pairs.smooth if self.gate is None else torch.sigmoid(self.gate(p)) * pairs.smooth)
        # m_ij = e_ij phi_e(h_i, h_j, d_ij, a_ij), and m_ji                                                (3)
        to_first, to_second = p * senders.index_select(0, second), p * senders.index_select(0, first)
        # m_i = sum_j m_ij                                                                                 (5)
        m_i = p.new_zeros(len(h), p.shape[1]).index_add(0, first, to_first).index_add(0, second, to_second)
        # v_i <- v_i + sum_j u_ij phi_x(m_ij) + v_j phi_v(m_ij)                (4, moving v and not the atoms)
        # in one product, which is faster than two
        maps = torch.cat([self.direction.weight, self.carry.weight]) if self.angles else self.direction.weight
        of_first, of_second = (
            functional.linear(m, maps)[:, None].chunk(1 + self.angles, dim=2) for m in (to_first, to_second)
        )
        push_first, push_second = units * of_first[0], -units * of_second[0]
        if self.angles:
            push_first = push_first + v_j * of_first[1]
            push_second = push_second + v_i * of_second[1]
        pushes = v.new_zeros(len(h), 3 * self.vectors)
        pushes = pushes.index_add(0, first, push_first.flatten(1)).index_add(0, second, push_second.flatten(1))
        v = v + pushes.view(-1, 3, self.vectors)
        # h_i <- h_i + phi_h(h_i, m_i, <v_i, v_i>)                                                         (6)
        invariants = (self.mix_left(v) * self.mix_right(v)).sum(dim=1)
        return h + self.update(torch.cat([x, m_i, invariants], dim=1)), v


class EGNN(nn.Module):
    """Normalized properties of molecules, invariant under rotation, translation, reflection and permutation.

    The first layers move the given geometry to the DFT minimum they expect (EGNN equation 4, once); the rest read the
    properties from the moved one.

    Args:
        config: Shape of the network.

    Attributes:
        scales: What one unit of each output is worth, in the order of `LATENTS`; set by the baseline. The dipole
            moment and R2 need it, because they are computed in physical units.
    """

    scales: Tensor
    masses: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.node_width
        self.config = config
        self.embedding = nn.Embedding(_MAX_NUMBER + 1, width)
        self.radial = RadialBasis(config.radial, config.cutoff)
        self.refiner = nn.ModuleList(EGNNLayer(config) for _ in range(config.refine_layers))
        if config.refine_layers:
            self.refiner_norm = nn.LayerNorm(width)
            self.shift = nn.Linear(width, config.vectors)
            if config.angles:
                self.entry = nn.Linear(config.vectors, config.vectors, bias=False)
        self.layers = nn.ModuleList(EGNNLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.atoms = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.sums = nn.Linear(width, len(_SUMS))
        self.potentials = nn.Linear(width, config.flows)
        self.conductance = nn.Linear(config.radial, config.flows)
        self.polarization = nn.Linear(width, config.vectors)
        self.scores = nn.Linear(width, config.heads)
        self.values = nn.Linear(width, width)
        energies = nn.Linear(width // 2, 2)
        self.orbitals = nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), energies)
        self.register_buffer("scales", torch.ones(len(LATENTS)))
        self.register_buffer("masses", _masses(), persistent=False)
        if config.refine_layers:
            self.unrest = nn.Linear(width, 1)
        # Begin near the baseline: large first dipoles and shifts would drown the gradients of everything else.
        for head in (self.sums, energies):
            nn.init.normal_(head.weight, std=0.1 / width**0.5)
            nn.init.zeros_(head.bias)
        with torch.no_grad():
            self.embedding.weight.mul_(0.3)
            if config.refine_layers:
                self.unrest.bias.fill_(2.0)
            for head in (self.conductance, self.polarization):
                head.weight.mul_(0.03)
                head.bias.mul_(0.03)

    def forward(
        self, numbers: Tensor, positions: Tensor, first: Tensor, second: Tensor, molecules: Tensor, molecule_count: int
    ) -> tuple[Tensor, Tensor]:
        """Predict.

        Args:
            numbers: Atomic numbers [N].
            positions: In Å, each molecule's center of mass at the origin. In float64 the network, though it computes
                in float32, answers the same for every orientation to about 1e-6 of a property's spread [N, 3].
            first: Index i of each pair of neighbors, ascending [P].
            second: Index j of each pair [P].
            molecules: Index of each atom's molecule, ascending [N].
            molecule_count: M.

        Returns:
            Outputs in the order of `LATENTS`, in units of `scales`, after the baseline of the refined geometry is
            removed [M, 10]; and the refined geometry in Å, its centers of mass at the origin [N, 3].
        """
        encoding = self.encode(numbers, positions, first, second, molecules, molecule_count)
        return self.read(encoding, molecules, molecule_count), encoding.positions

    def read(self, encoding: Encoding, molecules: Tensor, molecule_count: int) -> Tensor:
        """Return the outputs of `forward` for atoms that are encoded [M, 10]."""
        positions, pairs, h, v = encoding
        still = positions.detach()
        a = self.atoms(h)
        totals = sum_atoms(self.sums(a), molecules, molecule_count)
        outputs = dict(zip(_SUMS, totals.unbind(dim=1), strict=True))
        outputs["homo"], outputs["lumo"] = self._orbital_energies(h, molecules, molecule_count).unbind(dim=1)
        dipoles = (v * self.polarization(a)[:, None, :]).sum(dim=2)
        mu, r2 = _moments(self._charges(a, pairs), dipoles, still / BOHR_ANGSTROM, molecules, molecule_count)
        outputs["mu"] = mu * EA0_DEBYE / self.scales[LATENTS.index("mu")]
        outputs["r2"] = outputs["r2"] + r2 / self.scales[LATENTS.index("r2")]
        return torch.stack([outputs[key] for key in LATENTS], dim=1)

    def encode(
        self, numbers: Tensor, positions: Tensor, first: Tensor, second: Tensor, molecules: Tensor, molecule_count: int
    ) -> Encoding:
        """Refine the geometry and run the layers; arguments as for `forward`."""
        h = self.embedding(numbers)
        v = h.new_zeros(len(h), 3, self.config.vectors)
        if len(self.refiner):
            h, v = _run(self.refiner, h, v, self._pairs(positions, first, second))
            x = self.refiner_norm(h)
            # x_i <- x_i + g_i sum_j (x_i - x_j) / |x_i - x_j| phi_x(m_ij), g_i zero where nothing is to be done     (4)
            shifts = torch.sigmoid(self.unrest(x)) * (v * self.shift(x)[:, None, :]).sum(dim=2)
            mass = self.masses.index_select(0, numbers)[:, None]
            drift = sum_atoms(mass * shifts, molecules, molecule_count) / sum_atoms(mass, molecules, molecule_count)
            positions = positions + (shifts - drift.index_select(0, molecules)).to(positions.dtype)
            v = self.entry(v) if self.config.angles else torch.zeros_like(v)
        pairs = self._pairs(positions.detach(), first, second)
        h, v = _run(self.layers, h, v, pairs)
        return Encoding(positions, pairs, self.norm(h), v)

    def _pairs(self, positions: Tensor, first: Tensor, second: Tensor) -> Pairs:
        edges = positions.index_select(0, first) - positions.index_select(0, second)
        distances = torch.linalg.vector_norm(edges, dim=1)
        dtype = self.embedding.weight.dtype
        units = (edges / distances[:, None]).to(dtype)
        distances = distances.to(dtype)
        return Pairs(first, second, self.radial(distances), units, envelope(distances, self.config.cutoff)[:, None])

    def _charges(self, a: Tensor, pairs: Pairs) -> Tensor:
        """Return latent charges in e that are neutral in every connected fragment [N].

        q_i = sum_j f_ij with the flow f_ij = sum_k (p_ik - p_jk) g_k(d_ij) = -f_ji.
        """
        potentials: Tensor = self.potentials(a)
        differences = potentials.index_select(0, pairs.first) - potentials.index_select(0, pairs.second)
        flows: Tensor = (differences * (self.conductance(pairs.radial) * pairs.smooth)).sum(dim=1)
        return flows.new_zeros(len(a)).index_add(0, pairs.first, flows).index_add(0, pairs.second, -flows)

    def _orbital_energies(self, h: Tensor, molecules: Tensor, molecule_count: int) -> Tensor:
        """Return HOMO and LUMO from atom features pooled by attention, as intensive quantities need [M, 2]."""
        scores = self.scores(h)
        index = molecules[:, None].expand_as(scores)
        highest = scores.new_full((molecule_count, scores.shape[1]), -torch.inf)
        highest = highest.scatter_reduce(0, index, scores.detach(), "amax")
        weights = torch.exp(scores - highest.index_select(0, molecules))
        weights = weights / sum_atoms(weights, molecules, molecule_count).index_select(0, molecules)
        values = self.values(h).view(len(h), scores.shape[1], -1) * weights[:, :, None]
        pooled: Tensor = self.orbitals(sum_atoms(values.flatten(1), molecules, molecule_count))
        return pooled


def _run(layers: nn.ModuleList, h: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    for layer in layers:
        h, v = layer(h, v, pairs)
    return h, v


def sum_atoms(values: Tensor, molecules: Tensor, molecule_count: int) -> Tensor:
    """Sum atom values over each molecule: [N, ...] to [M, ...]."""
    return values.new_zeros(molecule_count, *values.shape[1:]).index_add(0, molecules, values)


def _bound(x: Tensor) -> Tensor:
    """Return x for small x, and never more than `_MOST`: a step toward too large vectors then does not feed itself."""
    return x * torch.rsqrt(1.0 + (x / _MOST).square())


def _masses() -> Tensor:
    masses = torch.ones(_MAX_NUMBER + 1)
    masses[list(ATOMIC_MASSES)] = torch.tensor(list(ATOMIC_MASSES.values()))
    return masses


def _moments(
    charges: Tensor, dipoles: Tensor, positions: Tensor, molecules: Tensor, molecule_count: int
) -> tuple[Tensor, Tensor]:
    """Return what charges q and dipoles p at the atoms contribute to the first and second moment.

    mu = |sum_i q_i r_i + p_i| and, because electrons count positive in R2,
    R2 = -sum_i (q_i |r_i|^2 + 2 p_i . r_i), about the origin.

    Args:
        charges: In e [N].
        dipoles: In e a0 [N, 3].
        positions: In a0 [N, 3].
        molecules: Index of each atom's molecule [N].
        molecule_count: M.

    Returns:
        mu in e a0 [M] and R2's part in a0^2 [M].
    """
    mu = sum_atoms(charges[:, None] * positions + dipoles, molecules, molecule_count)
    r2 = charges * positions.square().sum(dim=1) + 2.0 * (dipoles * positions).sum(dim=1)
    return torch.linalg.vector_norm(mu, dim=1), -sum_atoms(r2, molecules, molecule_count)
