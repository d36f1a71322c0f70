"""The network: an E(n)-equivariant graph neural network with outputs built from physics.

Message passing follows Satorras, Hoogeboom, Welling, "E(n) Equivariant Graph Neural Networks", ICML 2021 (equation
numbers below). Tensors in, tensors out; N atoms, E directed edges, M molecules, F node and D message features.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from qmprop.config import ModelConfig
from qmprop.targets import BOHR_ANGSTROM, EA0_DEBYE, ELEMENTS

#: What the network puts out, in this order; `baseline` turns them into the twelve properties.
#: thermal is U - U0, entropy is H - G.
LATENTS: Final = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0", "thermal", "entropy", "cv")
_SUMS: Final = ("alpha", "r2", "zpve", "u0", "thermal", "entropy", "cv")
_MAX_NUMBER: Final = max(ELEMENTS)


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


class EGNNLayer(nn.Module):
    """One round of messages (EGNN equations 3 to 6 with the soft edge gate of equation 8).

    The first map of phi_e on [h_i, h_j, d_ij] is split into A h_i + B h_j + C d_ij, so that A and B run once per atom.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        nodes, messages = config.node_width, config.message_width
        self.vectors = config.vectors
        self.norm = nn.LayerNorm(nodes)
        self.receiver = nn.Linear(nodes, messages)
        self.sender = nn.Linear(nodes, messages, bias=False)
        self.distance = nn.Linear(config.radial, messages, bias=False)
        self.message = nn.Linear(messages, messages)
        self.gate = nn.Linear(messages, 1)
        self.direction = nn.Linear(messages, config.vectors, bias=False)
        self.mix_left = nn.Linear(config.vectors, config.invariants, bias=False)
        self.mix_right = nn.Linear(config.vectors, config.invariants, bias=False)
        self.update = nn.Sequential(
            nn.Linear(nodes + messages + config.invariants, nodes), nn.SiLU(), nn.Linear(nodes, nodes)
        )

    def forward(
        self,
        h: Tensor,
        v: Tensor,
        radial: Tensor,
        units: Tensor,
        envelope: Tensor,
        receivers: Tensor,
        senders: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Update node states.

        Args:
            h: Node features [N, F].
            v: Node vectors [N, 3, V].
            radial: Distance features [E, K].
            units: (x_i - x_j) / |x_i - x_j| [E, 3].
            envelope: Smooth cut-off [E, 1].
            receivers: Index i of each edge [E].
            senders: Index j of each edge [E].

        Returns:
            The new h and v.
        """
        x = self.norm(h)
        # m_ij = phi_e(h_i, h_j, d_ij)                                                                   (3)
        m = self.distance(radial)
        m = m + self.receiver(x).index_select(0, receivers)
        m = m + self.sender(x).index_select(0, senders)
        m = functional.silu(self.message(functional.silu(m)))
        # e_ij m_ij with e_ij = sigmoid(w . m_ij + b), times the envelope                                  (8)
        m = m * (torch.sigmoid(self.gate(m)) * envelope)
        # m_i = sum_j e_ij m_ij                                                                          (5)
        m_i = m.new_zeros(len(h), m.shape[1]).index_add(0, receivers, m)
        # v_i <- v_i + sum_j (x_i - x_j) / |x_i - x_j| phi_x(m_ij)            (4, moving v and not the atoms)
        pushes = (units[:, :, None] * self.direction(m)[:, None, :]).flatten(1)
        v = v + v.new_zeros(len(h), 3 * self.vectors).index_add(0, receivers, pushes).view(-1, 3, self.vectors)
        # h_i <- h_i + phi_h(h_i, m_i, <v_i, v_i>)                                                         (6)
        invariants = (self.mix_left(v) * self.mix_right(v)).sum(dim=1)
        return h + self.update(torch.cat([x, m_i, invariants], dim=1)), v


class EGNN(nn.Module):
    """Normalized properties of molecules, invariant under rotation, translation, reflection and permutation.

    Args:
        config: Shape of the network.

    Attributes:
        scales: What one unit of each output is worth, in the order of `LATENTS`; set by the baseline. The dipole
            moment and R2 need it, because they are computed in physical units.
    """

    scales: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.node_width
        self.config = config
        self.embedding = nn.Embedding(_MAX_NUMBER + 1, width)
        self.radial = RadialBasis(config.radial, config.cutoff)
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
        for head in (self.sums, energies):
            nn.init.normal_(head.weight, std=0.1 / width**0.5)
            nn.init.zeros_(head.bias)

    def forward(
        self,
        numbers: Tensor,
        positions: Tensor,
        receivers: Tensor,
        senders: Tensor,
        molecules: Tensor,
        molecule_count: int,
    ) -> Tensor:
        """Predict.

        Args:
            numbers: Atomic numbers [N].
            positions: In Å, each molecule's center of mass at the origin. In float64 the network, though it computes
                in float32, answers the same for every orientation to about 1e-6 of a property's spread [N, 3].
            receivers: Index i of each edge, ascending [E].
            senders: Index j of each edge [E].
            molecules: Index of each atom's molecule, ascending [N].
            molecule_count: M.

        Returns:
            Outputs in the order of `LATENTS`, in units of `scales` after the baseline is removed [M, 10].
        """
        radial, smooth, h, v = self.encode(numbers, positions, receivers, senders)
        a = self.atoms(h)

        totals = sum_atoms(self.sums(a), molecules, molecule_count)
        outputs = dict(zip(_SUMS, totals.unbind(dim=1), strict=True))
        outputs["homo"], outputs["lumo"] = self._orbital_energies(h, molecules, molecule_count).unbind(dim=1)
        charges = self._charges(a, radial, smooth, receivers, senders)
        dipoles = (v * self.polarization(a)[:, None, :]).sum(dim=2)
        mu, r2 = _moments(charges, dipoles, positions / BOHR_ANGSTROM, molecules, molecule_count)
        outputs["mu"] = mu * EA0_DEBYE / self.scales[LATENTS.index("mu")]
        outputs["r2"] = outputs["r2"] + r2 / self.scales[LATENTS.index("r2")]
        return torch.stack([outputs[key] for key in LATENTS], dim=1)

    def encode(
        self, numbers: Tensor, positions: Tensor, receivers: Tensor, senders: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the layers; arguments as for `forward`.

        Returns:
            Distance features [E, K], envelope [E, 1], final node features [N, F] and vectors [N, 3, V].
        """
        edges = positions.index_select(0, receivers) - positions.index_select(0, senders)
        distances = torch.linalg.vector_norm(edges, dim=1)
        h = self.embedding(numbers)
        units = (edges / distances[:, None]).to(h.dtype)
        distances = distances.to(h.dtype)
        radial = self.radial(distances)
        smooth = envelope(distances, self.config.cutoff)[:, None]
        v = h.new_zeros(len(h), 3, self.config.vectors)
        for layer in self.layers:
            h, v = layer(h, v, radial, units, smooth, receivers, senders)
        return radial, smooth, self.norm(h), v

    def _charges(self, a: Tensor, radial: Tensor, smooth: Tensor, receivers: Tensor, senders: Tensor) -> Tensor:
        """Return latent charges in e that are neutral in every connected fragment [N].

        q_i = sum_j f_ij with the flow f_ij = sum_k (p_ik - p_jk) g_k(d_ij) = -f_ji.
        """
        potentials: Tensor = self.potentials(a)
        differences = potentials.index_select(0, receivers) - potentials.index_select(0, senders)
        flows: Tensor = (differences * (self.conductance(radial) * smooth)).sum(dim=1)
        return flows.new_zeros(len(a)).index_add(0, receivers, flows)

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


def sum_atoms(values: Tensor, molecules: Tensor, molecule_count: int) -> Tensor:
    """Sum atom values over each molecule: [N, ...] to [M, ...]."""
    return values.new_zeros(molecule_count, *values.shape[1:]).index_add(0, molecules, values)


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
