"""Power-function averages of any width, computed after the training from stored ones of a few widths.

Karras et al. 2024, section 3 and appendix C (arXiv:2312.02696). The power-function average of width σ_rel at step t
weighs the weights of step τ by its profile p(τ) = (γ + 1) τ^γ / t^(γ + 1) on [0, t]. The profile that is wanted is
approximated, in the sense of least squares, by a linear combination of the profiles of the stored averages; the same
combination of the averages themselves then is the wanted average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

WIDEST = 12**-0.5
"""The width of γ = 0, which weighs all steps alike."""


class Profile(NamedTuple):
    """What a power-function average is an average of.

    Attributes:
        step: t, the number of finished steps; at least 1.
        width: σ_rel.
    """

    step: int
    width: float


def exponent_of(width: float) -> float:
    """γ of the width σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3)): Karras et al. 2024, eq. 4 and algorithm 2.

    Squared, this is γ³ + 7 γ² + (16 - σ_rel⁻²) γ + 12 - σ_rel⁻² = 0, of which γ is the largest root.

    Args:
        width: σ_rel, in (0, WIDEST].
    """
    assert 0 < width <= WIDEST, width
    inverse = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def solve_weights(stored: Sequence[Profile], wanted: Profile) -> list[float]:
    """The factor of each stored average in the wanted one: Karras et al. 2024, algorithm 3.

    The least-squares solution x of A x = b, where A holds the inner products of the stored profiles with each other
    and b those with the wanted one. In float64; directions that it cannot tell apart get no weight.

    Args:
        stored: at least one; steps up to that of the wanted average.
        wanted: the profile to approximate.

    Returns:
        one factor for each stored profile, in their order. They add up to about 1; some are negative.
    """
    steps = np.array([profile.step for profile in stored], dtype=np.float64)
    exponents = np.array([exponent_of(profile.width) for profile in stored])
    products = _inner_product(steps[:, None], exponents[:, None], steps[None, :], exponents[None, :])
    target = _inner_product(steps, exponents, np.array(float(wanted.step)), np.array(exponent_of(wanted.width)))
    scale = 1 / np.sqrt(np.diag(products))  # profiles of one length: the cut below then treats them alike
    solution, *_ = np.linalg.lstsq(products * scale[:, None] * scale[None, :], target * scale, rcond=None)
    return [float(factor) for factor in solution * scale]


def _inner_product(
    step_a: np.ndarray, exponent_a: np.ndarray, step_b: np.ndarray, exponent_b: np.ndarray
) -> np.ndarray:
    """∫ p_a(τ) p_b(τ) dτ over [0, min(t_a, t_b)], in closed form.

    With t_a <= t_b it is (γ_a + 1) (γ_b + 1) / (γ_a + γ_b + 1) · (t_a / t_b)^γ_b / t_b.
    """
    exponent = np.where(step_a < step_b, exponent_b, -exponent_a)
    numerator = (exponent_a + 1) * (exponent_b + 1) * (step_a / step_b) ** exponent
    return np.asarray(numerator / ((exponent_a + exponent_b + 1) * np.maximum(step_a, step_b)))


def combine(states: Iterable[Mapping[str, Tensor]], factors: Iterable[float]) -> dict[str, Tensor]:
    """The sum of the stored averages, each times its factor.

    Args:
        states: state dicts with the same names and shapes. One after the other is looked at, so that an iterator may
            read each from its file. What holds no floating-point numbers is taken from the last one.
        factors: as `solve_weights` returns them.

    Returns:
        a state dict in the dtypes of the last one; the sum is formed in float64.
    """
    sums: dict[str, Tensor] = {}
    last: Mapping[str, Tensor] = {}
    for last, factor in zip(states, factors, strict=True):
        for name, value in last.items():
            if value.is_floating_point():
                part = value.double() * factor
                sums[name] = sums[name] + part if name in sums else part
    return {name: sums[name].to(value.dtype) if name in sums else value for name, value in last.items()}
