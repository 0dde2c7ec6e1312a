"""The next loss: curves over effective progress, and jumps at a switch.

Every version has a curve, loss = phi(X), over *effective samples* X. The loss alone is
the state: from a loss l follows X = phi^-1(l), an epoch adds x, and the next loss is
phi(X + x). Such a map is non-decreasing and 1-Lipschitz in l by construction, because
phi falls and flattens out; both are what the bounds on rounding rest on.

A switch adds a jump J(l) >= 0 with slope in [-1, 0], so that l + J(l) has slope in
[0, 1]. Below a version's floor nothing moves: a model that came there from a larger
version is stalled.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares


@dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale * X ** -exponent, X > 0 effective samples."""

    floor: float  # loss that more samples never go below
    scale: float  # loss above the floor at X = 1
    exponent: float

    def __post_init__(self):
        _check("power law", self.floor, scale=self.scale, exponent=self.exponent)

    def loss(self, progress: np.ndarray | float) -> np.ndarray:
        """Loss after `progress` effective samples."""
        with np.errstate(divide="ignore"):
            return self.floor + self.scale * np.power(progress, -self.exponent)

    def progress(self, loss: np.ndarray | float) -> np.ndarray:
        """Effective samples that lead to `loss`; infinite at the floor and below."""
        above = np.maximum(np.asarray(loss, float) - self.floor, 0)
        with np.errstate(divide="ignore"):
            return np.power(above / self.scale, -1 / self.exponent)


@dataclass(frozen=True)
class Exponential:
    """loss = floor + scale * exp(-rate * X), X in effective samples, of any sign."""

    floor: float
    scale: float
    rate: float  # per effective sample

    def __post_init__(self):
        _check("exponential", self.floor, scale=self.scale, rate=self.rate)

    def loss(self, progress: np.ndarray | float) -> np.ndarray:
        """Loss after `progress` effective samples."""
        return self.floor + self.scale * np.exp(-self.rate * np.asarray(progress))

    def progress(self, loss: np.ndarray | float) -> np.ndarray:
        """Effective samples that lead to `loss`; infinite at the floor and below."""
        above = np.maximum(np.asarray(loss, float) - self.floor, 0)
        with np.errstate(divide="ignore"):
            return -np.log(above / self.scale) / self.rate


@dataclass(frozen=True)
class Jump:
    """J(l) = height * (1 - exp(-rate * (top - l))), 0 above `top`.

    The better the model, the more it has to lose. `height * rate <= 1` keeps the slope
    of J above -1 and l + J below `top`.
    """

    height: float  # the most that is lost
    rate: float  # per unit of loss
    top: float  # loss of an uninformed model

    def __post_init__(self):
        for name in ("height", "rate", "top"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"jump: {name} must be a number >= 0, got {value}")
        if self.height * self.rate > 1 + 1e-9:
            raise ValueError(
                f"jump: height * rate is {self.height * self.rate:.3g}, above 1: a "
                "better model would be worse off after the switch"
            )

    def after(self, loss: np.ndarray | float) -> np.ndarray:
        """Loss right after the switch."""
        below = np.maximum(self.top - np.asarray(loss, float), 0)
        return loss - self.height * np.expm1(-self.rate * below)


def next_loss(
    curve: PowerLaw | Exponential, loss: np.ndarray | float, samples: float
) -> np.ndarray:
    """Loss after `samples` more effective samples; unchanged at or below the floor."""
    later = curve.loss(curve.progress(loss) + samples)
    return np.where(np.asarray(loss) <= curve.floor, loss, later)


def fit_curve(
    samples: np.ndarray, losses: np.ndarray, kind: str = "power"
) -> tuple[PowerLaw | Exponential, np.ndarray]:
    """Fits a curve to one run, or one to several runs together.

    By bounded least squares on the logarithm of the loss. Errors beyond 5 % count
    linearly, not squared: losses of a few steps jump. All points count alike.

    Args:
      samples: [n] samples seen, n >= 4, strictly increasing and positive; [R, n] of R
        runs.
      losses: Losses, positive, of the same shape.
      kind: "power", loss = floor + scale * (X + shift)^-exponent, or "exponential".

    Returns:
      The curve and the residuals, log(fitted / measured), of the losses' shape. The
      shift is fitted but not kept: a plan starts from a loss, not from a number of
      samples.

    Raises:
      ValueError: for too few, unordered or non-finite points, or an unknown kind.
    """
    x, y = (np.asarray(v, float) for v in (samples, losses))
    if kind not in ("power", "exponential"):
        raise ValueError(f"kind must be 'power' or 'exponential', got {kind!r}")
    if x.shape != y.shape or x.ndim not in (1, 2) or x.size < 4:
        raise ValueError(
            f"a fit needs at least 4 samples and as many losses, got {x.shape} and "
            f"{y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (y > 0).all()):
        raise ValueError("the profile holds losses that are not finite and positive")
    if x.min() <= 0 or (np.diff(x) <= 0).any():
        raise ValueError("samples must be positive and strictly increasing")
    unit, low, span = x.max(), y.min(), max(np.ptp(y), 1e-6 * y.max())
    power = kind == "power"

    def curve_of(p):
        floor, above, bend = p[:3]
        if power:  # `above` is the height over the floor at X = unit
            return PowerLaw(floor, above * unit**bend, bend)
        return Exponential(floor, above, bend / unit)

    def residuals(p):
        shift = p[3] * unit if power else 0.0
        return (np.log(curve_of(p).loss(x + shift)) - np.log(y)).ravel()

    # The floor lies under the lowest loss; nothing else is known of it.
    lower = [1e-9 * low, 1e-6 * span, 0.05 if power else 1e-3]
    upper = [0.999 * low, 1e3 * span, 4.0 if power else 1e3]
    starts = [0.9, 0.5, 0.1]
    if power:
        lower, upper = [*lower, 0.0], [*upper, 10.0]
    best = None
    for share in starts:  # the floor's scale is poorly determined: several starts
        p0 = [share * low, span if not power else 0.3 * span, 1.0 if not power else 0.5]
        p0 += [0.01] if power else []
        p0 = np.clip(p0, np.array(lower) * 1.001, np.array(upper) * 0.999)
        found = least_squares(
            residuals,
            p0,
            bounds=(lower, upper),
            x_scale=upper,
            loss="soft_l1",
            f_scale=0.05,
        )
        if best is None or found.cost < best.cost:
            best = found
    return curve_of(best.x), best.fun.reshape(x.shape)


def refit_curve(
    curve: PowerLaw | Exponential,
    before: np.ndarray,
    samples: np.ndarray,
    after: np.ndarray,
    noise: float,
    spread: float = 0.5,
) -> PowerLaw | Exponential:
    """Corrects a curve by the epochs that a run has seen so far.

    The floor, and how many samples the same progress takes, are moved to where they
    explain the epochs best, but not further from the profile than so few epochs
    warrant: the maximum a posteriori under normal errors. The bend stays.

    Args:
      curve: From the profile.
      before: [n] losses at the start of each epoch, after a switch if there was one.
      samples: [n] effective samples of each epoch.
      after: [n] losses at its end.
      noise: Standard deviation of a measured loss, relative; positive.
      spread: Standard deviation of the correction, of the number of samples in the
        logarithm and of the floor as a share of it; positive.

    Raises:
      ValueError: for losses that are not finite, or arrays of different lengths.
    """
    before, samples, after = _epochs(before, samples, after)

    def corrected(p):
        floor = curve.floor * (1 + spread * p[1])
        faster = np.exp(spread * p[0])
        if isinstance(curve, PowerLaw):
            scale = curve.scale * faster**-curve.exponent
            return PowerLaw(floor, scale, curve.exponent)
        return Exponential(floor, curve.scale, curve.rate * faster)

    def residuals(p):
        found = next_loss(corrected(p), before, samples)
        return np.concatenate([np.log(found / after) / noise, p])

    # A floor cannot fall below 0.
    bounds = [-6.0, max(-6.0, -0.999 / spread)], [6.0, 6.0]
    return corrected(least_squares(residuals, np.zeros(2), bounds=bounds).x)


def fit_efficiency(
    curve: PowerLaw | Exponential,
    before: np.ndarray,
    samples: np.ndarray,
    after: np.ndarray,
) -> tuple[float, float]:
    """The share of samples that must have counted, for a curve to explain some epochs.

    Least squares on the logarithm of the loss, so that epochs count more where the
    curve is steep, that is early: later ones say little beside the noise.

    Args:
      curve: Of the version that was trained.
      before: [n] losses before each epoch.
      samples: [n] samples of each.
      after: [n] losses after it.

    Returns:
      The share, from 0, where nothing was gained, to 1, where no less was gained than
      the curve promises; and its standard error, by the scatter of the epochs around
      it, inf for a single one.

    Raises:
      ValueError: for losses that are not finite, or arrays of different lengths.
    """
    before, samples, after = _epochs(before, samples, after)
    shares = np.append(0.0, np.geomspace(0.01, 1, 1000))
    ahead = np.log(next_loss(curve, before, shares[:, None] * samples))
    off = ((ahead - np.log(after)) ** 2).sum(1)
    best = int(np.argmin(off))
    slope = np.gradient(ahead, shares, axis=0)[best]
    if len(before) < 2 or not slope.any():
        return float(shares[best]), math.inf
    noise = off[best] / (len(before) - 1)
    return float(shares[best]), float(np.sqrt(noise / np.sum(slope**2)))


def _epochs(before, samples, after) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses around some epochs, and their samples, as arrays that were checked."""
    arrays = tuple(np.asarray(v, float) for v in (before, samples, after))
    if len({v.shape for v in arrays}) > 1 or arrays[0].ndim != 1:
        raise ValueError(
            "a fit to epochs needs one loss before and after for each epoch, got "
            f"{', '.join(str(v.shape) for v in arrays)}"
        )
    if not (np.isfinite(arrays[0]).all() and np.isfinite(arrays[2]).all()):
        raise ValueError("the epochs hold losses that are not finite")
    return arrays


def fit_jump(before: np.ndarray, after: np.ndarray, top: float) -> Jump:
    """Fits a jump to checkpoints that were compressed at several losses.

    Args:
      before: [n] losses before the switch.
      after: [n] losses right after it, without training.
      top: Loss of an uninformed model.

    Raises:
      ValueError: for no points, or points that are not finite.
    """
    x, y = (np.asarray(v, float) for v in (before, after))
    if x.shape != y.shape or x.ndim != 1 or not x.size:
        raise ValueError(f"need as many losses after as before: {x.shape}, {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the profile holds jumps that are not finite")
    # Pruning sometimes helps, and sometimes leads above the uninformed loss. Neither
    # is offered to a planner: it would prune for the gain, or stop being monotone.
    rise = np.clip(y, x, top) - x

    def residuals(p):
        # Parameters height and height * rate: the constraint becomes a bound.
        return Jump(p[0], p[1] / p[0], top).after(x) - x - rise

    spread = max(top - x.min(), 1e-6)
    found = least_squares(
        residuals,
        [max(rise.max(), 1e-3 * spread), 0.5],
        # A little less than 1, as records round numbers to seven digits.
        bounds=([1e-6 * spread, 0.0], [10 * spread, 1 - 1e-5]),
        x_scale=[spread, 1.0],
    )
    return Jump(float(found.x[0]), float(found.x[1] / found.x[0]), top)


def _check(kind: str, floor: float, **positive: float) -> None:
    if not (math.isfinite(floor) and floor >= 0):
        raise ValueError(f"{kind}: floor must be a number >= 0, got {floor}")
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{kind}: {name} must be a number above 0, got {value}")
