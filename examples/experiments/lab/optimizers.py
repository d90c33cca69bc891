"""Optimizers by name, with settings: `adamw_b95`, `sparse_ggt:window_size=16`."""

from collections.abc import Callable
import inspect
import json
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import efcp_jax
from lab import baselines


class Entry(NamedTuple):
    """An optimizer of the registry.

    Attributes:
        make: From a learning rate and settings to a gradient transformation.
        centre: From the settings to the learning rate that its grid lies around.
        searches: Whether a line search finds the length of steps, so that there is no
            grid.
    """

    make: Callable[..., optax.GradientTransformation]
    centre: Callable[[dict[str, Any]], float]
    searches: bool = False


class Spec(NamedTuple):
    """A name of the registry with settings; `str()` is how it is written."""

    name: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        """Return the specification as the command line takes it."""
        pairs = [f"{k}={json.dumps(v)}" for k, v in sorted(self.settings.items())]
        return ":".join([self.name, *([",".join(pairs)] if pairs else [])])


ALIASES = ("mfac", "sparse_mfac", "low_rank_mfac", "ggt", "sparse_ggt", "low_rank_ggt")
REGISTRY = {
    "adamw_b95": Entry(baselines.adamw(0.95), lambda _: 8e-3),
    "adamw_b999": Entry(baselines.adamw(0.999), lambda _: 8e-3),
    "sgd": Entry(baselines.sgd, lambda _: 0.2),
    "muon": Entry(baselines.muon, lambda _: 1.6e-2),
    "lbfgs": Entry(baselines.lbfgs, lambda _: 1.0, searches=True),
    # Its authors: as Adam's, "maybe slightly lower (like /2)".
    "psgd_kron": Entry(baselines.psgd_kron, lambda _: 4e-3),
    # Its page gives it and Adam the same one.
    "prism": Entry(baselines.prism, lambda _: 8e-3),
}
for _name in ALIASES:
    # The library's rules of thumb: 1 / window for M-FAC, 1 for GGT, and ten times less
    # with momentum.
    REGISTRY[_name] = Entry(
        getattr(efcp_jax, _name),
        lambda settings, ggt="ggt" in _name: (
            (1.0 if ggt else 1 / (settings.get("window_size") or 64))
            * (1 - (settings.get("momentum") or 0.0))
        ),
    )

# Settings of every optimizer, which are not arguments of its factory: global norms that
# the gradient, and the update before the learning rate, are clipped to.
CLIPS = ("clip_gradient", "clip_update")
NOT_SETTINGS = {"learning_rate", "mask", "sharding"}


def parse(text: str) -> Spec:
    """Return the specification written `name`, `name:key=value,...` or `name:{JSON}`.

    Values are JSON; what is not is text. Commas inside of brackets belong to a value.

    Raises:
        ValueError: An unknown name or setting, or a pair without `=`.
    """
    name, _, rest = text.partition(":")
    if name not in REGISTRY:
        raise ValueError(
            f"no optimizer is called {name!r}; choose from {', '.join(REGISTRY)}"
        )
    if rest.startswith("{"):
        try:
            settings = json.loads(rest)
        except json.JSONDecodeError as error:
            raise ValueError(f"the settings of {text!r} are no JSON: {error}") from None
    else:
        settings = dict(_pair(text, part) for part in _split(rest))
    known = {*inspect.signature(REGISTRY[name].make).parameters, *CLIPS}
    unknown = sorted(set(settings) - (known - NOT_SETTINGS))
    if unknown:
        raise ValueError(
            f"{name} has no setting {', '.join(unknown)}; it has"
            f" {', '.join(sorted(known - NOT_SETTINGS))}"
        )
    return Spec(name, settings)


def _split(text):
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def _pair(text, part):
    key, equal, value = part.partition("=")
    if not equal:
        raise ValueError(f"{part!r} in {text!r} is no setting; write key=value")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def make(spec: Spec, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer of a specification.

    Raises:
        ValueError: A setting is out of range.
        TypeError: A setting is of the wrong type.
    """
    settings = {
        key: jnp.dtype(value) if key.endswith("dtype") and value else value
        for key, value in spec.settings.items()
        if key not in CLIPS
    }
    if "metric" in settings:
        settings["metric"] = _metric(settings["metric"])
    gradient, update = (spec.settings.get(key) for key in CLIPS)
    factory = REGISTRY[spec.name].make
    if update is None:
        parts = [factory(schedule, **settings)]
    else:
        parts = [
            factory(1.0, **settings),
            optax.clip_by_global_norm(update),
            optax.scale_by_schedule(schedule),
        ]
    if gradient is not None:
        parts.insert(0, optax.clip_by_global_norm(gradient))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _metric(value):
    """Return what true, false, `auto` or settings of a diagonal metric stand for."""
    if not value or isinstance(value, str):
        return value or None
    return efcp_jax.diagonal_metric(**({} if value is True else value))
